"""What a plan gathers: the values of which every rank needs all rows, and why."""

from typing import Any

from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import REPLICATED, Sharded
from llmos_tf.partition.plan import Plan


def gathered(plan: Plan) -> list[dict[str, Any]]:
    """Returns the values that a step gathers along the rows.

    Args:
        plan: of the step.

    Returns:
        For each value a dict: `op`, its name; `type` of the op; `layer`, in whose scope it is made;
        `bytes_per_row`, None where that is not known; `without_rule`, the types of the ops that
        have no rule for sharded rows, empty where an op needs all rows by what it computes.
    """
    plans = plan.with_inner()
    unknown = {id(node) for one in plans for node in one.without_rule}
    return [
        {
            "op": change.value.node.name,
            "type": change.value.node.type,
            "layer": _layer(change.value.node),
            "bytes_per_row": _bytes_per_row(change.value, change.source.dim),
            "without_rule": sorted({u.type for u in change.value.users if id(u) in unknown}),
        }
        for one in plans
        for change in one.changes
        if isinstance(change.source, Sharded) and change.target == REPLICATED
    ]


def _layer(node: Node) -> str:
    """The scopes in which the op was made, without those of gradients and calls."""
    scopes = [part for part in node.name.split("/")[:-1] if part != "gradient_tape"]
    return "/".join(scopes)


def _bytes_per_row(value: Value, dim: int) -> int | None:
    size = value.dtype.size * (value.dims[dim].row_factor or 0)
    for i, known in enumerate(value.dims):
        if i != dim:
            if known is None or known.length is None:
                return None
            size *= known.length
    return size or None
