"""Which tensors of a program have the same value on every rank, seen from the graph.

Each rank computes with rows of its own, so what follows from them differs between ranks, until a
collective has reduced or gathered it. A loss has been: it is the same everywhere, and whoever adds
it up over the ranks has to count it once. A sum that a rank has taken over its rows has not been.
JAX tracks the same as "varying manual axes" in the types of `shard_map`.
"""

from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.sharding.variables import ShardedVariable
from llmos_tf.spmd.program import ReplicaProgram

_SAME: frozenset[str] = frozenset()
# Their results are those of a group of ranks. Other collectives give each rank something else.
_UNITING = ("CollectiveReduceV2", "CollectiveGatherV2")


def varying_axes(program: ReplicaProgram, x: tf.Tensor) -> frozenset[str]:
    """Returns the axes of the batch along which ranks may differ in a tensor.

    Args:
        program: the program of this rank.
        x: a tensor of it, or anything that is a constant.

    Returns:
        Axis names; none for what is the same on every rank. Where the graph does not tell, as for
        results of loops and of functions with state, all of them.
    """
    if not tf.is_symbolic_tensor(x):
        return _SAME
    x = _outer(x)
    known: dict[Any, frozenset[str]] = {}
    # Not by recursion: a model is deeper than Python's stack.
    unfinished = [x]
    while unfinished:
        tensor = unfinished[-1]
        sources = [source for source in _sources(tensor) if tf.is_symbolic_tensor(source)]
        missing = [source for source in sources if source.ref() not in known]
        if missing:
            unfinished += missing
            continue
        inputs = _SAME.union(*(known[source.ref()] for source in sources))
        known[unfinished.pop().ref()] = _axes_of(program, tensor, inputs)
    return known[x.ref()]


def _outer(tensor: tf.Tensor) -> tf.Tensor:
    """What a function's graph has captured as `tensor`, in the graph where it was made."""
    while tf.is_symbolic_tensor(tensor) and tensor.op.type == "Placeholder":
        outer = [source for source, inside in tensor.graph.captures if inside is tensor]
        if not outer:
            break
        (tensor,) = outer
    return tensor


def _sources(tensor: tf.Tensor) -> list[tf.Tensor]:
    """What a tensor is computed of, as far as ranks may differ by it."""
    op = tensor.op
    if op.type == "ReadVariableOp":
        return []
    if op.type == "IdentityN":
        # A function with a gradient of its own: its results, and what it was given.
        return [_outer(op.inputs[tensor.value_index])]
    # Size, keys and token of a collective differ between groups, its result does not.
    return [_outer(x) for x in (op.inputs[:1] if op.type.startswith("Collective") else op.inputs)]


def _axes_of(program: ReplicaProgram, tensor: tf.Tensor, inputs: frozenset[str]) -> frozenset[str]:
    """The axes along which a tensor varies whose sources vary along `inputs`."""
    op = tensor.op
    if op.type == "ReadVariableOp":
        return _axes_of_variable(program, _outer(op.inputs[0]))
    if op.type in _UNITING:
        return inputs - program.axes_of_group(_outer(op.inputs[2]))
    # A placeholder that captures nothing is an argument: rows, or the rank's coordinate.
    if op.type == "Placeholder" or op.op_def.is_stateful:
        return _split(program).intersection(BATCH_AXES)
    return inputs


def _axes_of_variable(program: ReplicaProgram, handle: tf.Tensor) -> frozenset[str]:
    variable = _internal.captured_container(handle)
    if variable is None:
        return _SAME
    axes = _split(program).intersection(BATCH_AXES)
    # Exactly: streams of random numbers and metrics are each rank's own.
    if type(variable) is not ShardedVariable or id(variable) in program.statistics:
        return axes
    return axes.intersection((*variable.layout.dims, *variable.layout.flat))


def _split(program: ReplicaProgram) -> frozenset[str]:
    return frozenset(axis for axis, size in program.mesh.sizes.items() if size > 1)
