"""Rules of reductions along dimensions."""

from collections.abc import Sequence

import tensorflow as tf

from llmos_tf.partition.graph.choice import Choice, Rule, can_shard, reduced, same, sharded_dim
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Partial, Placement, Sharded


def reduced_dims(node: Node) -> list[int] | None:
    """Returns which dimensions of its first input a reduction reduces.

    Args:
        node: the op, whose second input names the dimensions.

    Returns:
        Dimensions, not negative; None where they are not known.
    """
    value, axes = node.inputs[0], node.inputs[1].constant
    if value.rank is None or axes is None:
        return None
    return sorted({int(axis) % max(value.rank, 1) for axis in axes.reshape(-1)})


def _kept_dim(node: Node, dims: list[int], dim: int) -> int:
    """The dimension of the output that dimension `dim`, which is not reduced, becomes."""
    keeps = node.bool_attr("keep_dims")
    return dim if keeps else dim - sum(other < dim for other in dims)


def _reduction(node: Node, inputs: Sequence[Placement], kind: str) -> Choice | None:
    placement = reduced(inputs[0])
    dim, dims = sharded_dim(placement), reduced_dims(node)
    if dim is None or dims is None:
        return None
    needed = [placement, REPLICATED]
    if dim in dims:
        return same(node, needed, Partial(kind))
    output = _kept_dim(node, dims, dim)
    return same(node, needed, Sharded(output)) if can_shard(node.outputs[0], output) else None


def sum_(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds up: ranks have parts of the sum."""
    if inputs[0] == PARTIAL:
        return same(node, [PARTIAL, REPLICATED], PARTIAL)
    return _reduction(node, inputs, "sum")


def mean(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Averages: ranks have parts of the sum over the global number of entries."""
    if inputs[0] == PARTIAL:
        return same(node, [PARTIAL, REPLICATED], PARTIAL)
    choice = _reduction(node, inputs, "sum")
    if choice is None or choice.outputs[0] != PARTIAL:
        return choice
    if node.outputs[0].dtype.is_integer:
        # Rounded once, of the whole sum.
        return None
    dim = inputs[0].dim

    def emit(emission, node, inputs):
        x, axes = inputs
        total = tf.raw_ops.Sum(input=x, axis=axes, keep_dims=node.bool_attr("keep_dims"))
        shape = emission.global_shape(node.inputs[0], dim, x)
        count = tf.reduce_prod(tf.gather(shape, reduced_dims(node)))
        # A mean of nothing is 0/0 on one device too.
        return [total / tf.cast(count, total.dtype)]

    return choice._replace(emit=emit)


def extremum(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Takes the largest or the smallest entry: ranks have those of their rows."""
    return _reduction(node, inputs, "max" if node.type in ("Any", "Max") else "min")


def along_others(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Reduces other dimensions than the sharded one."""
    choice = _reduction(node, inputs, "sum")
    return None if choice is None or choice.outputs[0] == PARTIAL else choice


def l2_loss(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds up squares."""
    placement = reduced(inputs[0])
    return same(node, [placement], PARTIAL) if isinstance(placement, Sharded) else None


def bias_add_grad(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds up over all dimensions but that of the channels."""
    if inputs[0] == PARTIAL:
        return same(node, inputs, PARTIAL)
    dim, rank = sharded_dim(inputs[0]), node.inputs[0].rank
    if dim is None:
        return None
    channels = 1 if node.str_attr("data_format") == "NCHW" else rank - 1
    return same(node, inputs, Sharded(0) if dim == channels else PARTIAL)


RULES: dict[str, Rule] = {
    "All": extremum,
    "Any": extremum,
    "BiasAddGrad": bias_add_grad,
    "EuclideanNorm": along_others,
    "L2Loss": l2_loss,
    "Max": extremum,
    "Mean": mean,
    "Min": extremum,
    "Prod": along_others,
    "ReduceJoin": along_others,
    "Sum": sum_,
}
