"""Trace once, call per device.

`MirroredStrategy` runs a replica function in one thread for each device and traces it once for
each. Here it is traced once, and one call of the traced function is placed on every device, with
that device's variable handles, coordinate and rows of the batch as inputs. See docs/adr/0001.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.program import ReplicaProgram


class Engine:
    """Runs replica functions on the local ranks of a mesh.

    Args:
        extended: the strategy's `MeshExtended`, which owns mesh, devices, keys and tokens.
    """

    def __init__(self, extended: Any):
        self._extended = extended
        self._eager_functions: dict[Any, tf.types.experimental.PolymorphicFunction] = {}
        self.num_traces = 0

    def run(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs `fn` on every local rank.

        Args:
            fn: the replica function.
            args: its arguments; a `PerReplica` gives each rank its rows of the batch.
            kwargs: its keyword arguments.

        Returns:
            Results, one for each part of the batch, as `tf.distribute` returns them.
        """
        if tf.inside_function():
            return self._run_in_graph(fn, args, kwargs)
        # Eagerly, one device's collective would wait for devices that were not yet called.
        key = getattr(fn, "__wrapped__", fn)
        if key not in self._eager_functions:
            self._eager_functions[key] = tf.function(
                lambda args, kwargs: self._run_in_graph(fn, args, kwargs), autograph=False
            )
        return self._eager_functions[key](args, kwargs)

    def _run_in_graph(self, fn: Callable, args: tuple, kwargs: dict) -> Any:
        extended = self._extended
        per_rank = [
            _internal.select_replica(extended.local_batch_index(rank), (args, kwargs))
            for rank in extended.local_ranks
        ]
        flat = [tf.nest.flatten(value, expand_composites=True) for value in per_rank]
        is_tensor = [tf.is_tensor(value) for value in flat[0]]
        inputs = [[v for v, t in zip(values, is_tensor, strict=True) if t] for values in flat]
        specs = [_common_spec(values) for values in zip(*inputs, strict=True)]

        def program(coordinate, *tensors):
            remaining = iter(tensors)
            values = [next(remaining) if t else v for v, t in zip(flat[0], is_tensor, strict=True)]
            rank_args, rank_kwargs = tf.nest.pack_sequence_as(
                per_rank[0], values, expand_composites=True
            )
            self.num_traces += 1
            with self._program(coordinate), extended.replica_hooks():
                return fn(*rank_args, **rank_kwargs)

        coordinate_spec = tf.TensorSpec([extended.mesh.coordinates().shape[1]], tf.int32)
        # Not inlined: a loop in an inlined copy has a name of its own on each device, TensorFlow puts
        # that name into the keys of the collectives in the loop, and the ranks would never meet.
        traced = tf.function(program, autograph=False, experimental_attributes={"_noinline": True})
        concrete = traced.get_concrete_function(coordinate_spec, *specs)
        return self._call_everywhere(concrete, inputs)

    def _program(self, coordinate: tf.Tensor) -> ReplicaProgram:
        extended = self._extended
        return ReplicaProgram(
            extended.container_strategy(),
            extended.mesh,
            coordinate,
            extended.tokens.values[0].handle,
            extended.collective_keys,
            extended.communication,
            extended.sequence_parallel,
        )

    def _call_everywhere(self, concrete: Any, inputs: list[list[tf.Tensor]]) -> Any:
        extended = self._extended
        coordinates = extended.mesh.coordinates()
        results = []
        for index, (rank, device) in enumerate(
            zip(extended.local_ranks, extended.worker_devices, strict=True)
        ):
            captures = [_capture_of(tensor, index) for tensor in concrete.captured_inputs]
            with tf.device(device):
                coordinate = tf.constant(coordinates[rank])
                results.append(
                    _internal.call_with_captures(concrete, [coordinate, *inputs[index]], captures)
                )
        return _internal.regroup(tuple(results[i] for i in extended.batch_representatives))


def _common_spec(values: tuple[tf.Tensor, ...]) -> tf.TensorSpec:
    """The narrowest spec that all ranks' tensors fit: rows of an uneven batch differ in number."""
    shape = values[0].shape
    for value in values[1:]:
        shape = shape.most_specific_compatible_shape(value.shape)
    return tf.TensorSpec(shape, values[0].dtype)


def _capture_of(tensor: tf.Tensor, index: int) -> tf.Tensor:
    """What the rank at `index` passes where rank 0's program captured `tensor`."""
    container = _internal.captured_container(tensor)
    return tensor if container is None else container.values[index].handle
