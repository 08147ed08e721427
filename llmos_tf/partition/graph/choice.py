"""What a rule says of an op: how its inputs are to be placed, and how its outputs are then."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import REPLICATED, Partial, Placement, Sharded

# Makes the outputs of an op on a rank of its inputs: (emission, node, inputs) to outputs.
Emit = Callable[[Any, Node, list], list]


class Choice(NamedTuple):
    """How an op is computed on every rank.

    Args:
        inputs: the placement that each input needs; None for an input that `emit` does not use.
        outputs: the placement that each output has.
        emit: makes the outputs where the op as it is would not; None for the op as it is.
    """

    inputs: tuple[Placement | None, ...]
    outputs: tuple[Placement, ...]
    emit: Emit | None = None


# A rule is given the placements that the inputs have. None says that it has no way other than to
# compute the whole on every rank.
Rule = Callable[[Node, Sequence[Placement]], Choice | None]


def same(
    node: Node, inputs: Sequence[Placement | None], output: Placement, emit: Emit | None = None
) -> Choice:
    """Returns the choice in which all outputs have one placement.

    Args:
        node: the op.
        inputs: the placement that each input needs.
        output: that of each output.
        emit: as in `Choice`.

    Returns:
        The choice.
    """
    return Choice(tuple(inputs), (output,) * len(node.outputs), emit)


def whole(node: Node) -> Choice:
    """Returns the choice that every rank computes all of an op.

    Args:
        node: the op.

    Returns:
        The choice.
    """
    return same(node, [REPLICATED] * len(node.inputs), REPLICATED)


def can_shard(value: Value, dim: int) -> bool:
    """Returns whether a dimension of a value counts rows, and so may be sharded.

    Args:
        value: an input or output of an op.
        dim: of it.

    Returns:
        True where its length on a rank follows from the rank's number of rows.
    """
    if value.dims is None or not 0 <= dim < len(value.dims) or value.dims[dim] is None:
        return False
    return value.dims[dim].row_factor is not None


def shape_placement(value: Value, dim: int) -> Placement | None:
    """Returns how an op needs the shape of its output: not at all where it follows from the rows.

    Args:
        value: the output.
        dim: the dimension along which it is sharded.

    Returns:
        The placement of the input that is the shape.
    """
    others = [known for i, known in enumerate(value.dims) if i != dim]
    if value.dims[dim].is_fixed and all(d is not None and d.length is not None for d in others):
        return None
    return REPLICATED


def first_place(value: Value) -> int | None:
    """Returns the first dimension along which a value may be sharded, or None."""
    if value.dims is None:
        return None
    return next((dim for dim in range(len(value.dims)) if can_shard(value, dim)), None)


def reduced(placement: Placement) -> Placement:
    """Returns the placement after partial values were reduced."""
    return REPLICATED if isinstance(placement, Partial) else placement


def sharded_dim(placement: Placement) -> int | None:
    """Returns the dimension along which a value is sharded, or None."""
    return placement.dim if isinstance(placement, Sharded) else None


def first_sharded(inputs: Sequence[Placement]) -> int | None:
    """Returns the position of the first input that is sharded, or None."""
    return next((i for i, p in enumerate(inputs) if isinstance(p, Sharded)), None)
