"""Rules of matrix products: an op of labelled dimensions, of which equal ones go together."""

from collections.abc import Sequence

from llmos_tf.partition.graph.choice import Choice, Rule, can_shard, same
from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Partial, Placement, Sharded

_LETTERS = "abcdefghijklmnopqrstuvw"
# No labels of an equation.
_DOTTED = "0123456789"
_NOWHERE = "!?"


def _contraction(
    node: Node, inputs: Sequence[Placement], labels: Sequence[str], output: str
) -> Choice | None:
    """Shards a contraction: along a label that is summed over, ranks have parts of the sum."""
    placements = list(inputs)
    if any(isinstance(p, Partial) for p in placements):
        if sum(p != REPLICATED for p in placements) == 1 and PARTIAL in placements:
            return same(node, placements, PARTIAL)
        placements = [REPLICATED if isinstance(p, Partial) else p for p in placements]
    sharded = [i for i, p in enumerate(placements) if isinstance(p, Sharded)]
    if not sharded:
        return None
    # Of two that are sharded along unlike dimensions the larger stays.
    first = max(sharded, key=lambda i: _size(node, i))
    label = labels[first][placements[first].dim]
    if any(own.count(label) > 1 for own in labels):
        return None
    needed = [Sharded(own.index(label)) if label in own else REPLICATED for own in labels]
    if not all(
        can_shard(node.inputs[i], p.dim) for i, p in enumerate(needed) if isinstance(p, Sharded)
    ):
        return None
    if label not in output:
        return same(node, needed, PARTIAL)
    return same(node, needed, Sharded(output.index(label)))


def _size(node: Node, i: int) -> int:
    size = 1
    for dim in node.inputs[i].dims:
        size *= 1 if dim is None else dim.large
    return size


def matmul(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Multiplies two matrices."""
    first = "ka" if node.bool_attr("transpose_a") else "ak"
    second = "bk" if node.bool_attr("transpose_b") else "kb"
    return _contraction(node, inputs, (first, second), "ab")


def batch_matmul(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Multiplies matrices; a leading dimension of length 1 is broadcast."""
    ranks = [value.rank for value in node.inputs]
    if None in ranks:
        return None
    batch = _LETTERS[3 : 3 + max(ranks) - 2]
    names = ("transpose_a", "transpose_b") if node.type == "BatchMatMulV4" else ("adj_x", "adj_y")
    flipped = [node.bool_attr(name) for name in names]
    matrices = ["ka" if flipped[0] else "ak", "bk" if flipped[1] else "kb"]
    labels = []
    for i, value in enumerate(node.inputs):
        own = list(batch[len(batch) - (value.rank - 2) :])
        for place, dim in enumerate(value.dims[:-2]):
            if dim is not None and dim.length == 1:
                # It matches nothing.
                own[place] = _NOWHERE[i]
        labels.append("".join(own) + matrices[i])
    return _contraction(node, inputs, labels, batch + "ab")


def einsum(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Contracts by an equation."""
    sources, output = node.str_attr("equation").replace(" ", "").split("->")
    labels = sources.split(",")
    if "." in sources:
        if any(value.dims is None for value in node.inputs):
            return None
        # What the dots stand for is broadcast, from the last of them.
        counts = [len(x.dims) - len(own) + 3 for x, own in zip(node.inputs, labels, strict=True)]
        dotted = [n for n, own in zip(counts, labels, strict=True) if "." in own]
        names = _DOTTED[: max(dotted)]
        output = output.replace("...", names)
        for i, own in enumerate(labels):
            if "." in own:
                labels[i] = _with_names(node.inputs[i], own, names[len(names) - counts[i] :], i)
    return _contraction(node, inputs, labels, output)


def _with_names(value: Value, labels: str, names: str, place: int) -> str:
    """Labels with names of the dimensions that dots stand for; of a broadcast one a name apart."""
    first = labels.index(".")
    broadcast = _NOWHERE[place]
    own = [
        broadcast if dim is not None and dim.length == 1 else name
        for name, dim in zip(names, value.dims[first:], strict=False)
    ]
    return labels.replace("...", "".join(own))


def bias_add(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds a vector along the channels."""
    if inputs[0] == PARTIAL:
        return same(node, [PARTIAL, PARTIAL], PARTIAL)
    rank = node.inputs[0].rank
    if rank is None:
        return None
    channels = 1 if node.str_attr("data_format") == "NCHW" else rank - 1
    value = inputs[0]
    if not isinstance(value, Sharded):
        if not isinstance(inputs[1], Sharded):
            return None
        value = Sharded(channels)
    bias = Sharded(0) if value.dim == channels else REPLICATED
    return same(node, [value, bias], value)


RULES: dict[str, Rule] = {
    "BatchMatMul": batch_matmul,
    "BatchMatMulV2": batch_matmul,
    "BatchMatMulV3": batch_matmul,
    "BiasAdd": bias_add,
    "Einsum": einsum,
    "MatMul": matmul,
}
