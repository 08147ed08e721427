"""Rules of ops that make a tensor of a shape: a rank makes the entries that it needs."""

from collections.abc import Callable, Sequence

import tensorflow as tf

from llmos_tf.partition.graph.choice import Choice, Rule, can_shard, same, shape_placement
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.graph.placements import REPLICATED, Placement, Sharded
from llmos_tf.partition.rules.movement import with_local_shape

# How many numbers of a type Philox makes of one value of its counter (random_distributions.h).
_PHILOX_NUMBERS = {2: 4, 4: 4, 8: 2}
_STATELESS = (
    "StatelessRandomNormalV2",
    "StatelessRandomUniformFullIntV2",
    "StatelessRandomUniformV2",
)
_WITH_BOUNDS = ("StatelessRandomUniformIntV2",)
# Ops of which a rank can draw its own rows.
PHILOX = frozenset(_STATELESS + _WITH_BOUNDS)

# Makes the choice in which the output of an op is sharded along a dimension.
Creation = Callable[[Node, int], Choice | None]


def fill(node: Node, dim: int) -> Choice | None:
    """Makes rows of one value."""
    if not can_shard(node.outputs[0], dim):
        return None
    needed = [shape_placement(node.outputs[0], dim), REPLICATED]
    return same(node, needed, Sharded(dim), with_local_shape(dim, 0))


def broadcast(node: Node, dim: int) -> Choice | None:
    """Broadcasts to the rank's rows."""
    value, output = node.inputs[0], node.outputs[0]
    if value.rank is None or not can_shard(output, dim):
        return None
    own = value.rank - output.rank + dim
    is_row = own >= 0 and value.dims[own] is not None and value.dims[own].length != 1
    if is_row and not can_shard(value, own):
        return None
    needed = [Sharded(own) if is_row else REPLICATED, shape_placement(output, dim)]
    return same(node, needed, Sharded(dim), with_local_shape(dim, 1))


def tile(node: Node, dim: int) -> Choice | None:
    """Repeats a row as often as the rank has rows."""
    value = node.inputs[0]
    if value.rank is None or not can_shard(node.outputs[0], dim):
        return None
    if value.dims[dim] is None or value.dims[dim].length != 1:
        return None

    def emit(emission, node, inputs):
        x, multiples = inputs
        length = emission.local_length(node.outputs[0], dim, lambda: multiples[dim])
        return emission.copy(node, [x, emission.with_entry(multiples, dim, length)])

    return same(node, [REPLICATED, REPLICATED], Sharded(dim), emit)


def philox(node: Node, dim: int) -> Choice | None:
    """Draws the numbers of the rank's rows: the counter begins where those of the others end."""
    output = node.outputs[0]
    if not can_shard(output, dim) or dim != 0 or output.dtype.size not in _PHILOX_NUMBERS:
        return None
    each = _PHILOX_NUMBERS[output.dtype.size]

    def emit(emission, node, inputs):
        shape, key, counter, *others = inputs
        local = emission.local_shape(output, dim, shape)
        in_row = tf.reduce_prod(tf.cast(shape[1:], tf.int64))
        first = tf.cast(emission.start(output, dim, lambda: shape[dim]), tf.int64) * in_row
        count = tf.reduce_prod(tf.cast(local, tf.int64))
        skipped = first % each
        ahead = tf.bitcast(tf.stack([first // each, 0]), tf.uint64)
        numbers = emission.copy(node, [[count + each], key, counter + ahead, *others])[0]
        return [tf.reshape(numbers[skipped : skipped + count], local)]

    return same(node, [REPLICATED] * len(node.inputs), Sharded(dim), emit)


CREATIONS: dict[str, Creation] = {
    "BroadcastTo": broadcast,
    "Fill": fill,
    "Tile": tile,
    **dict.fromkeys(PHILOX, philox),
}


def shape_of(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Tells the global shape, of which a rank knows its part."""
    value = node.inputs[0]
    if value.dims is None and isinstance(inputs[0], Sharded):
        return None

    def emit(emission, node, inputs):
        placement = inputs_placement[0]
        dim = placement.dim if isinstance(placement, Sharded) else None
        if value.dims is None:
            return emission.copy(node, inputs)
        shape = emission.global_shape(value, dim, inputs[0])
        shape = tf.reduce_prod(shape) if node.type == "Size" else shape
        return [tf.cast(shape, node.outputs[0].dtype)]

    is_known = value.dims is not None and all(
        dim is not None and (dim.length is not None or (dim.is_fixed and dim.row_factor))
        for dim in value.dims
    )
    inputs_placement: list = [None if is_known else inputs[0]]
    return same(node, inputs_placement, REPLICATED, emit)


def shapes_of(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Tells several global shapes."""
    found = list(inputs)

    def emit(emission, node, inputs):
        dims = [p.dim if isinstance(p, Sharded) else None for p in found]
        shapes = map(emission.global_shape, node.inputs, dims, inputs)
        return [tf.cast(shape, node.outputs[0].dtype) for shape in shapes]

    return same(node, found, REPLICATED, emit)


def number_of_dims(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Tells the number of dimensions, which ranks agree on."""
    return same(node, inputs, REPLICATED)


RULES: dict[str, Rule] = {
    "Rank": number_of_dims,
    "Shape": shape_of,
    "ShapeN": shapes_of,
    "Size": shape_of,
}
