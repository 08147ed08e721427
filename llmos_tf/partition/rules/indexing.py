"""Rules of ops that look up, count or scatter by indices."""

from collections.abc import Sequence

from llmos_tf.partition.graph.choice import Choice, Rule, can_shard, reduced, same, sharded_dim
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Partial, Placement, Sharded

_SEGMENT_REDUCTIONS = {
    "UnsortedSegmentMax": "max",
    "UnsortedSegmentMin": "min",
    "UnsortedSegmentSum": "sum",
}


def gather(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Looks up entries along an axis."""
    table, indices, axis = node.inputs
    if axis.constant is None or table.rank is None or indices.rank is None:
        return None
    batch = node.int_attr("batch_dims")
    batch += indices.rank if batch < 0 else 0
    axis_ = int(axis.constant) % table.rank
    placements = [reduced(inputs[0]) if inputs[1] != REPLICATED else inputs[0], reduced(inputs[1])]
    if placements[0] == PARTIAL:
        return same(node, [PARTIAL, REPLICATED, REPLICATED], PARTIAL)
    of_table, of_indices = map(sharded_dim, placements)
    if of_indices is not None:
        if of_indices < batch:
            return _if_possible(node, (of_indices, of_indices), of_indices)
        return _if_possible(node, (None, of_indices), axis_ + of_indices - batch)
    if of_table is not None and of_table == axis_:
        return _if_rows_are_looked_up(node, axis_, batch)
    if of_table is None:
        return None
    if of_table < batch:
        return _if_possible(node, (of_table, of_table), of_table)
    moved = indices.rank - batch - 1 if of_table > axis_ else 0
    return _if_possible(node, (of_table, None), of_table + moved)


def _if_rows_are_looked_up(node: Node, axis: int, batch: int) -> Choice | None:
    """Looks up rows of the batch, which are put together: a rank takes as many as it has."""
    indices = node.inputs[1]
    dim = next((i for i in range(batch, indices.rank) if can_shard(indices, i)), None)
    return None if dim is None else _if_possible(node, (None, dim), axis + dim - batch)


def _if_possible(node: Node, dims: tuple[int | None, ...], output: int) -> Choice | None:
    """The choice in which the first inputs are sharded along `dims`, where they can be."""
    if not can_shard(node.outputs[0], output):
        return None
    needed: list[Placement] = [REPLICATED] * len(node.inputs)
    for i, dim in enumerate(dims):
        if dim is not None:
            if not can_shard(node.inputs[i], dim):
                return None
            needed[i] = Sharded(dim)
    return same(node, needed, Sharded(output))


def gather_nd(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Looks up entries by several indices each."""
    indices = node.inputs[1]
    dim = sharded_dim(inputs[1])
    if dim is None or indices.rank is None or dim == indices.rank - 1:
        return None
    return _if_possible(node, (None, dim), dim)


def one_hot(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds a dimension of classes."""
    dim, rank = sharded_dim(inputs[0]), node.outputs[0].rank
    if dim is None or rank is None:
        return None
    axis = node.int_attr("axis") % rank
    return _if_possible(node, (dim,), dim + (dim >= axis))


def segment_reduction(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Reduces entries of equal numbers: ranks have parts of the result."""
    kind = _SEGMENT_REDUCTIONS[node.type]
    data, ids = node.inputs[:2]
    if data.rank is None or ids.rank is None:
        return None
    if inputs[0] == PARTIAL and inputs[1] == REPLICATED and kind == "sum":
        return same(node, [PARTIAL, REPLICATED, REPLICATED], PARTIAL)
    dim = sharded_dim(inputs[0])
    if dim is None:
        dim = sharded_dim(inputs[1])
    if dim is None:
        return None
    if dim >= ids.rank:
        return _if_possible(node, (dim,), dim - ids.rank + 1)
    if not can_shard(data, dim) or not can_shard(ids, dim):
        return None
    return same(node, [Sharded(dim), Sharded(dim), REPLICATED], Partial(kind))


def bincount(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Counts numbers, of each row or of all: of all, ranks have parts of the counts."""
    numbers, _, weights = node.inputs
    dim = sharded_dim(inputs[0])
    if dim is None:
        dim = sharded_dim(inputs[2])
    if dim is None or numbers.dims is None or weights.dims is None:
        return None
    has_weights = not any(d is not None and d.length == 0 for d in weights.dims)
    needed = [Sharded(dim), REPLICATED, Sharded(dim) if has_weights else REPLICATED]
    if not all(can_shard(node.inputs[i], p.dim) for i, p in enumerate(needed) if p != REPLICATED):
        return None
    if numbers.rank == 2 and dim == 0:
        return same(node, needed, Sharded(0))
    is_binary = node.type == "DenseBincount" and node.bool_attr("binary_output")
    if numbers.rank != 1 and node.type == "DenseBincount":
        return None
    return same(node, needed, Partial("max") if is_binary else PARTIAL)


def histogram(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Counts numbers in bins: ranks have parts of the counts."""
    if not isinstance(inputs[0], Sharded):
        return None
    return same(node, [inputs[0], REPLICATED, REPLICATED], PARTIAL)


def bound(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Finds the place of each value in the sorted row of the same number."""
    dim = sharded_dim(inputs[0]) if reduced(inputs[1]) == REPLICATED else sharded_dim(inputs[1])
    if dim is None or (dim and reduced(inputs[1]) == REPLICATED):
        return None
    return _if_possible(node, (None, 1) if dim else (0, 0), dim)


def scatter_nd(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds entries into zeros: ranks have parts of the sum."""
    indices, updates = node.inputs[:2]
    if inputs[1] == PARTIAL and inputs[0] == REPLICATED:
        return same(node, [REPLICATED, PARTIAL, REPLICATED], PARTIAL)
    dim = sharded_dim(inputs[0])
    if dim is None:
        dim = sharded_dim(inputs[1])
    if dim is None or indices.rank is None or dim >= indices.rank - 1:
        return None
    if not can_shard(indices, dim) or not can_shard(updates, dim):
        return None
    return same(node, [Sharded(dim), Sharded(dim), REPLICATED], PARTIAL)


RULES: dict[str, Rule] = {
    "DenseBincount": bincount,
    "HistogramFixedWidth": histogram,
    "LowerBound": bound,
    "UpperBound": bound,
    "GatherNd": gather_nd,
    "GatherV2": gather,
    "OneHot": one_hot,
    "ScatterNd": scatter_nd,
    **dict.fromkeys(_SEGMENT_REDUCTIONS, segment_reduction),
}
