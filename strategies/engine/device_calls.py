"""The call of a traced function on one device, such that its error is the one that is raised.

When an op fails, TensorFlow cancels the step, and a device that waits for another one, or for a
tensor of it, ends with an error of its own, as "RecvAsync is cancelled". TensorFlow keeps the first
error of a device: where the device waits beside its call, that is the wait's. The error of the op
that failed, which names the cause, is lost.

So one device, the host, calls the functions of all by the op `RemoteCall`, which cancels the rest
of the step only after its own function has returned its error. That one is the first.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives.annotations import noted_device


class DeviceFunction:
    """A traced function that devices call.

    Args:
        concrete: the function.
        devices: full names of those that call it.
    """

    def __init__(self, concrete: Any, devices: Sequence[str]):
        self.concrete = concrete
        self._host = devices[0]
        kinds = {tf.DeviceSpec.from_string(device).device_type for device in devices}
        # On GPUs results come together on the host, which calls nothing; and there `RemoteCall`
        # takes integers for tensors of the device.
        self._caller = self._traced_caller() if kinds == {"CPU"} else None

    def __call__(
        self, inputs: Sequence[tf.Tensor], captures: Sequence[tf.Tensor], device: str
    ) -> Any:
        """Places a call on a device.

        Args:
            inputs: of the function.
            captures: what it is given where it captured something while it was traced.
            device: full name.

        Returns:
            What the function returns.
        """
        if self._caller is None:
            with tf.device(device):
                return _internal.call_with_captures(self.concrete, list(inputs), list(captures))
        with tf.device(self._host), noted_device(device):
            outputs = self._outputs_of_call([*inputs, *captures], device)
        structure = self.concrete.structured_outputs
        leaves = tf.nest.flatten(structure, expand_composites=True)
        remaining = iter(outputs)
        flat = [None if leaf is None else next(remaining) for leaf in leaves]
        return tf.nest.pack_sequence_as(structure, flat, expand_composites=True)

    def _traced_caller(self) -> Any:
        """A function that calls this one: `RemoteCall` runs its own as it is, not optimized.

        It has an input and an output, which `RemoteCall` needs.
        """
        total = len(self.concrete.inputs)
        count = total - len(self.concrete.captured_inputs)

        def caller(*values):
            inputs, captures = list(values[:count]), list(values[count:total])
            results = _internal.call_with_captures(self.concrete, inputs, captures)
            return results if self.concrete.outputs else tf.constant(0)

        specs = [tf.TensorSpec(x.shape, x.dtype) for x in self.concrete.inputs or [tf.constant(0)]]
        return tf.function(caller, autograph=False).get_concrete_function(*specs)

    def _outputs_of_call(self, values: list[tf.Tensor], device: str) -> list[tf.Tensor]:
        graph = tf.compat.v1.get_default_graph()
        self._caller.add_to_graph(graph)
        with _internal.reads_of(self._caller, graph, first=1):
            outputs = tf.raw_ops.RemoteCall(
                target=device,
                args=values or [tf.constant(0)],
                Tout=[x.dtype for x in self._caller.outputs],
                f=self._caller.name,
            )
        results = outputs[: len(self.concrete.outputs)]
        for y, x in zip(results, self.concrete.outputs, strict=True):
            y.set_shape(x.shape)
        return results
