"""Errors of one device, raised as the error of the whole step.

TensorFlow runs one executor for each device of a step. An executor keeps the first error of its
ops, and the step raises the errors of all devices except *derived* ones, which are cancellations
caused by another error. When an op fails inside a called function, TensorFlow cancels the step
before the call returns. A device that waits for a tensor of another device besides its call then
keeps "RecvAsync is cancelled", and the error of the failed op is lost.

Devices exchange tensors through a *rendezvous*. An executor that fails first aborts its rendezvous
with its own error, which ends all pending receives, and cancels the step afterwards. A called
function has a rendezvous of its own, unless it has the attribute ``shared_rendezvous``: with it,
the receives of all devices end with the error of the failed op.

A rendezvous identifies a tensor by its name and the two devices. Two concurrent calls of a function
with ops on several devices would receive each other's tensors, so that only functions on one device
share the rendezvous of their caller.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")


def trace_for_devices(
    body: Callable,
    specs: Sequence[tf.TensorSpec],
    given: Sequence[tf.Tensor] = (),
    **attributes: Any,
) -> tf.types.experimental.ConcreteFunction:
    """Traces a function that devices call, directly or from another function.

    Args:
        body: function of tensors.
        specs: specs of the tensors.
        given: tensors of another graph that the arguments stand for, where known; default none.
        **attributes: function attributes such as ``_noinline``.

    Returns:
        The function. It shares the caller's rendezvous if all its ops run on the calling device.
    """

    def function(*tensors):
        results = body(*tensors)
        graph = tf.compat.v1.get_default_graph()
        outside = {inner.ref(): outer for inner, outer in zip(graph.inputs, given, strict=False)}
        outside |= {inner.ref(): outer for outer, inner in graph.captures}
        shares.b = _runs_on_one_device(graph, outside)
        return results

    function.__name__ = body.__name__
    traced = tf.function(function, autograph=False, experimental_attributes=attributes)
    shares = _internal.shared_rendezvous(traced)
    with _internal.python_where_called() if _only_cpus() else contextlib.nullcontext():
        return traced.get_concrete_function(*specs)


@contextlib.contextmanager
def awaited_calls(devices: Sequence[str], called: Iterable[Any]) -> Iterator[list[tf.Operation]]:
    """Makes each device wait for the last function called on another device in this context.

    A device that receives nothing reports the error its own call returns. If the op that failed
    is in a nested function, other ops of the called function are cancelled first, and the call
    returns a derived error.

    Args:
        devices: device names.
        called: the called functions; without nested functions, no op is added.

    Yields:
        Control inputs of the calls: ops that finish once all devices have started.
    """
    nested = any(_internal.graphs_of_functions(function.graph) for function in called)
    if len(devices) == 1 or not nested or not _only_cpus():
        yield []
        return
    graph = tf.compat.v1.get_default_graph()
    begun = []
    for device in devices:
        with tf.device(device):
            begun.append(tf.no_op())
    with tf.device(devices[0]), tf.control_dependencies(begun):
        all_have_begun = tf.no_op()
    count = len(graph.get_operations())
    yield [all_have_begun]
    last = {op.device: op for op in graph.get_operations()[count:] if op.type in _CALLS}
    calling = list(last)
    for call, device in zip(last.values(), calling[1:] + calling[:1], strict=True):
        with tf.device(device), tf.control_dependencies([call]):
            graph.control_outputs.append(tf.no_op())


def _only_cpus() -> bool:
    return {device.device_type for device in tf.config.list_logical_devices()} == {"CPU"}


def _runs_on_one_device(graph: tf.Graph, outside: Mapping[Any, tf.Tensor]) -> bool:
    """Whether all ops of a function run on the device that calls it."""
    # On accelerators, ops without a kernel are placed on the host.
    if not _only_cpus():
        return False
    graphs = [graph, *_internal.graphs_of_functions(graph)]
    if any(op.device for one in graphs for op in one.get_operations()):
        return False
    # An op on a resource runs where the resource is.
    resources = [outside.get(x.ref(), x) for x in graph.inputs if x.dtype == tf.resource]
    return all(map(_is_on_device_of_rank, resources))


def _is_on_device_of_rank(resource: tf.Tensor) -> bool:
    while tf.is_symbolic_tensor(resource):
        captures = {inner.ref(): outer for outer, inner in resource.graph.captures}
        if resource.ref() not in captures:
            return False
        resource = captures[resource.ref()]
    variable = _internal.captured_container(resource)
    if variable is None:
        return False
    devices = variable.distribute_strategy.extended.worker_devices
    return [component.device for component in variable.values] == list(devices)
