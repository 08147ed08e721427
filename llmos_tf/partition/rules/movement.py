"""Rules of ops that move entries: reshape, transpose, slice, concatenate and the like."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from llmos_tf.partition.graph.choice import (
    Choice,
    Emit,
    Rule,
    can_shard,
    first_sharded,
    same,
    shape_placement,
)
from llmos_tf.partition.graph.dims import product
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Placement, Sharded


def with_local_shape(dim: int, shape_input: int):
    """Returns what makes an op that is given the shape of its output, on a rank.

    Args:
        dim: the dimension of the output that is sharded.
        shape_input: position of the input that is the shape.

    Returns:
        The function, for `Choice`.
    """

    def emit(emission, node, inputs):
        inputs = list(inputs)
        output = node.outputs[0]
        inputs[shape_input] = emission.local_shape(output, dim, inputs[shape_input])
        return emission.copy(node, inputs)

    return emit


def _others(node: Node, placement: Placement) -> list[Placement]:
    """The first input has a placement; the others, which are small, every rank has."""
    return [placement] + [REPLICATED] * (len(node.inputs) - 1)


def reshape(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Keeps what is sharded along the outermost factor of a dimension."""
    placement = inputs[0]
    if placement == PARTIAL:
        return same(node, [PARTIAL, REPLICATED], PARTIAL)
    value, output = node.inputs[0], node.outputs[0]
    if not isinstance(placement, Sharded) or value.dims is None or output.dims is None:
        return None
    outer = product(value.dims[: placement.dim])
    for dim in range(len(output.dims)):
        # What lies inside of the dimension may become part of it, or come out of it.
        if outer is not None and can_shard(output, dim) and product(output.dims[:dim]) == outer:
            needed = [placement, shape_placement(output, dim)]
            return same(node, needed, Sharded(dim), _reshaping(dim))
    return None


def _reshaping(dim: int) -> Emit:
    def emit(emission, node, inputs):
        x, shape = inputs
        return emission.copy(node, [x, emission.reshaped(node.outputs[0], dim, shape)])

    return emit


def ensure_shape(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Checks a shape, of which a rank has its rows."""
    if not isinstance(inputs[0], Sharded):
        return same(node, inputs, inputs[0])
    shape = node.attr["shape"].shape
    if shape.unknown_rank:
        return same(node, inputs, inputs[0])
    lengths = [None if dim.size < 0 else dim.size for dim in shape.dim]
    lengths[inputs[0].dim] = None

    def emit(emission, node, inputs):
        del emission, node
        return [tf.ensure_shape(inputs[0], lengths)]

    return same(node, inputs, inputs[0], emit)


def transpose(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Permutes dimensions."""
    order = node.inputs[1].constant
    if order is None:
        return None
    placement = inputs[0]
    if isinstance(placement, Sharded):
        placement = Sharded(order.tolist().index(placement.dim))
    return same(node, [inputs[0], REPLICATED], placement)


def expand_dims(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds a dimension of length 1."""
    axis = node.inputs[1].constant
    if axis is None or node.outputs[0].rank is None:
        return None
    placement = inputs[0]
    if isinstance(placement, Sharded):
        new = int(axis.reshape(-1)[0]) % node.outputs[0].rank
        placement = Sharded(placement.dim + (placement.dim >= new))
    return same(node, [inputs[0], REPLICATED], placement)


def squeeze(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Removes dimensions of length 1."""
    value, placement = node.inputs[0], inputs[0]
    if value.dims is None:
        return None
    given = [i % value.rank for i in node.attr["squeeze_dims"].list.i]
    if not given and None in value.dims:
        return None
    dims = given or [i for i, dim in enumerate(value.dims) if dim.length == 1]

    def emit(emission, node, inputs):
        # By name: a batch, or a rank's part of it, may have one row only.
        del emission
        return [tf.squeeze(inputs[0], dims) if dims else tf.identity(inputs[0])]

    if not isinstance(placement, Sharded):
        return same(node, inputs, placement, emit)
    if placement.dim in dims:
        return None
    output = placement.dim - sum(dim < placement.dim for dim in dims)
    return same(node, inputs, Sharded(output), emit)


def concat(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Concatenates along another dimension than the sharded one."""
    values, axis = list(node.inputs[:-1]), node.inputs[-1].constant
    if axis is None:
        return None
    found = list(inputs[:-1])
    if PARTIAL in found and not any(isinstance(p, Sharded) for p in found):
        return same(node, [PARTIAL] * len(values) + [REPLICATED], PARTIAL)
    first = first_sharded(found)
    if first is None or values[first].rank is None:
        return None
    dim = found[first].dim
    if int(axis) % values[first].rank == dim:
        return None
    if not all(can_shard(value, dim) for value in values):
        return None
    return same(node, [Sharded(dim)] * len(values) + [REPLICATED], Sharded(dim))


def pack(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Stacks along a new dimension."""
    if PARTIAL in inputs and not any(isinstance(p, Sharded) for p in inputs):
        return same(node, [PARTIAL] * len(inputs), PARTIAL)
    first = first_sharded(inputs)
    if first is None or node.outputs[0].rank is None:
        return None
    dim, axis = inputs[first].dim, node.int_attr("axis") % node.outputs[0].rank
    if not all(can_shard(value, dim) for value in node.inputs):
        return None
    return same(node, [Sharded(dim)] * len(inputs), Sharded(dim + (dim >= axis)))


def unpack(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Takes apart along another dimension than the sharded one."""
    placement, rank = inputs[0], node.inputs[0].rank
    if not isinstance(placement, Sharded):
        return same(node, inputs, placement)
    axis = node.int_attr("axis") % rank
    if axis == placement.dim:
        return None
    return same(node, inputs, Sharded(placement.dim - (placement.dim > axis)))


def split(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Splits along another dimension than the sharded one."""
    place = 1 if node.type == "Split" else 0
    axis = node.inputs[0 if node.type == "Split" else 2].constant
    placement, value = inputs[place], node.inputs[place]
    if axis is None or value.rank is None or placement == REPLICATED:
        return None
    if isinstance(placement, Sharded) and int(axis) % value.rank == placement.dim:
        return None
    needed = [REPLICATED] * len(inputs)
    needed[place] = placement
    return same(node, needed, placement)


def slice_(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Slices other dimensions than the sharded one, of which all is kept."""
    placement = inputs[0]
    if placement == PARTIAL:
        return same(node, _others(node, PARTIAL), PARTIAL)
    if not isinstance(placement, Sharded):
        return None
    begin = node.inputs[1].constants
    dims, outputs = node.inputs[0].dims, node.outputs[0].dims
    if begin is None or outputs is None or outputs[placement.dim] is None:
        return None
    if begin[0][placement.dim] or not outputs[placement.dim].is_like(dims[placement.dim]):
        return None

    def emit(emission, node, inputs):
        x, begin, size = inputs
        size = emission.with_entry(size, placement.dim, tf.shape(x, begin.dtype)[placement.dim])
        return emission.copy(node, [x, begin, size])

    return same(node, _others(node, placement), placement, emit)


def strided_slice(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Slices other dimensions than the sharded one, of which all is kept, by x[:, 1:] and alike."""
    placement = inputs[0]
    if placement == PARTIAL:
        return same(node, _others(node, PARTIAL), PARTIAL)
    if not isinstance(placement, Sharded):
        return None
    output = _sliced_dim(node, node.inputs[0].rank, placement.dim)
    if output is None:
        return None
    return same(node, _others(node, placement), Sharded(output))


def _sliced_dim(node: Node, rank: int, dim: int) -> int | None:
    """The dimension of a slice that dimension `dim`, of which all is kept, becomes."""
    masks = {
        name: node.int_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    strides = node.inputs[-2 if node.type == "StridedSliceGrad" else 3].constant
    if strides is None:
        return None
    count = strides.size
    new = sum(bool(masks["new_axis"] >> i & 1) for i in range(count))
    source = output = 0
    for i in range(count):
        if masks["ellipsis"] >> i & 1:
            skipped = rank - (count - new - 1)
            if source <= dim < source + skipped:
                return output + dim - source
            source, output = source + skipped, output + skipped
        elif masks["new_axis"] >> i & 1:
            output += 1
        else:
            if source == dim:
                is_all = masks["begin"] >> i & 1 and masks["end"] >> i & 1 and strides[i] == 1
                is_all = is_all and not masks["shrink_axis"] >> i & 1
                return output if is_all else None
            source += 1
            output += not masks["shrink_axis"] >> i & 1
    return output + dim - source


def strided_slice_grad(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Puts a slice back into zeros."""
    placement, rank = inputs[4], node.outputs[0].rank
    if placement == PARTIAL:
        return same(node, [REPLICATED] * 4 + [PARTIAL], PARTIAL)
    if not isinstance(placement, Sharded) or rank is None:
        return None
    found = [d for d in range(rank) if _sliced_dim(node, rank, d) == placement.dim]
    if len(found) != 1 or not can_shard(node.outputs[0], found[0]):
        return None
    emit = with_local_shape(found[0], 0)
    needed = [shape_placement(node.outputs[0], found[0]), *[REPLICATED] * 3, placement]
    return same(node, needed, Sharded(found[0]), emit)


def pad(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Pads other dimensions than the sharded one."""
    placement, paddings = inputs[0], node.inputs[1].constants
    if placement == PARTIAL and node.type != "PadV2":
        return same(node, _others(node, PARTIAL), PARTIAL)
    if not isinstance(placement, Sharded) or paddings is None:
        return None
    if any(np.any(padding[placement.dim]) for padding in paddings):
        return None
    emit = _emit_with_a_row(placement.dim) if node.type.startswith("Mirror") else None
    return same(node, _others(node, placement), placement, emit)


def _emit_with_a_row(dim: int):
    """What runs a kernel that refuses to work on no rows."""

    def emit(emission, node, inputs):
        padded = emission.with_a_row(inputs[0], dim)
        return [emission.without_it(emission.copy(node, [padded, *inputs[1:]])[0], inputs[0], dim)]

    return emit


def tile(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Repeats along other dimensions than the sharded one."""
    placement, multiples = inputs[0], node.inputs[1].constants
    if placement == PARTIAL:
        return same(node, _others(node, PARTIAL), PARTIAL)
    if not isinstance(placement, Sharded) or multiples is None:
        return None
    if any(multiple[placement.dim] != 1 for multiple in multiples):
        return None
    return same(node, _others(node, placement), placement)


def broadcast_to(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Broadcasts along other dimensions than the sharded one."""
    placement, value, output = inputs[0], node.inputs[0], node.outputs[0]
    if placement == PARTIAL:
        return same(node, [PARTIAL, REPLICATED], PARTIAL)
    if not isinstance(placement, Sharded) or output.rank is None:
        return None
    dim = placement.dim + output.rank - value.rank
    if not can_shard(output, dim):
        return None
    needed = [placement, shape_placement(output, dim)]
    return same(node, needed, Sharded(dim), with_local_shape(dim, 1))


def along_others(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Works along dimensions that its second input names, and not along the sharded one."""
    placement, axes = inputs[0], node.inputs[1].constant
    rank = node.inputs[0].rank
    if placement == PARTIAL and node.type in ("ReverseV2", "Cumsum"):
        return same(node, _others(node, PARTIAL), PARTIAL)
    if not isinstance(placement, Sharded) or axes is None:
        return None
    if placement.dim in [int(axis) % rank for axis in axes.reshape(-1)]:
        return None
    return same(node, _others(node, placement), placement)


def roll(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Rolls along other dimensions than the sharded one."""
    placement, axes = inputs[0], node.inputs[2].constant
    if placement == PARTIAL:
        return same(node, _others(node, PARTIAL), PARTIAL)
    if not isinstance(placement, Sharded) or axes is None:
        return None
    if placement.dim in [int(axis) % node.inputs[0].rank for axis in axes.reshape(-1)]:
        return None
    return same(node, _others(node, placement), placement)


def bitcast(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Takes bits for another type: the last dimension goes, or another one is added to it."""
    placement, value = inputs[0], node.inputs[0]
    if not isinstance(placement, Sharded) or value.rank is None:
        return None
    goes = node.outputs[0].dtype.size > value.dtype.size and placement.dim == value.rank - 1
    return None if goes else same(node, inputs, placement)


RULES: dict[str, Rule] = {
    "Bitcast": bitcast,
    "BroadcastTo": broadcast_to,
    "ConcatV2": concat,
    "EnsureShape": ensure_shape,
    "ConjugateTranspose": transpose,
    "Cumprod": along_others,
    "Cumsum": along_others,
    "CumulativeLogsumexp": along_others,
    "ExpandDims": expand_dims,
    "MirrorPad": pad,
    "MirrorPadGrad": pad,
    "Pack": pack,
    "Pad": pad,
    "PadV2": pad,
    "Reshape": reshape,
    "ReverseV2": along_others,
    "Roll": roll,
    "Slice": slice_,
    "Split": split,
    "SplitV": split,
    "Squeeze": squeeze,
    "StridedSlice": strided_slice,
    "StridedSliceGrad": strided_slice_grad,
    "Tile": tile,
    "Transpose": transpose,
    "Unpack": unpack,
}
