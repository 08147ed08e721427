"""Conditions: each branch is planned by itself, and a rank takes the branch that all ranks take.

The predicate is the same on every rank, so collectives in a branch meet.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from llmos_tf.partition.graph.choice import Choice, can_shard, first_place
from llmos_tf.partition.graph.flat_graph import FlatGraph, Node, Value
from llmos_tf.partition.graph.inference import CONDITIONS
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Placement, Sharded


def plan_condition(planner: Any, node: Node) -> tuple[Node, Choice]:
    """Plans the branches of a condition.

    Args:
        planner: of the graph in which it is.
        node: the condition.

    Returns:
        The node with an input for each placement in which a branch needs a value, and the choice.
    """
    predicate, *inputs = node.inputs
    given = [planner.given(value) for value in inputs]
    branches = [planner.inner(flat, given) for flat in node.functions]
    outputs = [
        agreed(
            [branch.natural(value) for branch, value in zip(branches, values, strict=True)], value
        )
        for value, *values in zip(
            node.outputs, *(flat.outputs for flat in node.functions), strict=True
        )
    ]
    plans = [branch.planned(outputs) for branch in branches]
    needed = list(
        dict.fromkeys(
            (flat.inputs.index(value), placement)
            for flat, plan in zip(node.functions, plans, strict=True)
            for value, placement in plan.inputs
        )
    )
    expanded = replace(node, inputs=[predicate, *(inputs[i] for i, _ in needed)], plans=plans)

    def emit(emission, node, tensors):
        def branch(flat: FlatGraph, plan):
            given = [
                (flat.inputs[i], placement, tensor)
                for (i, placement), tensor in zip(needed, tensors[1:], strict=True)
            ]
            return lambda: _present(emission.nested().run(plan, given, flat.outputs))

        made = _condition(node, tensors[0], list(map(branch, node.functions, plans)))
        remaining = iter(tf.nest.flatten(made))
        return [None if placement is None else next(remaining) for placement in outputs]

    placements = (REPLICATED, *(placement for _, placement in needed))
    return expanded, Choice(placements, tuple(outputs), emit)


def agreed(found: Sequence[Placement | None], output: Value) -> Placement | None:
    """Returns the placement of what one of several branches returns.

    Args:
        found: that of each branch; None where a branch can give any.
        output: what is returned.

    Returns:
        The placement; None for the handle of a variable.
    """
    kinds = set(found) - {None}
    if output.dtype == tf.resource:
        return None
    if not kinds:
        dim = first_place(output)
        return REPLICATED if dim is None else Sharded(dim)
    sharded = [kind for kind in kinds if isinstance(kind, Sharded)]
    if len(sharded) == 1 and can_shard(output, sharded[0].dim):
        return sharded[0]
    is_sum = PARTIAL in kinds and kinds <= {PARTIAL, REPLICATED} and output.dtype != tf.variant
    return PARTIAL if is_sum else REPLICATED


def _present(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not None]


def _condition(node: Node, predicate: tf.Tensor, branches: list[Any]) -> Any:
    if "Case" in node.type:
        return tf.switch_case(predicate, branches)
    then, other = branches
    return tf.cond(_as_bool(predicate), then, other)


def _as_bool(predicate: tf.Tensor) -> tf.Tensor:
    """What the op of a condition takes for true."""
    if predicate.shape.rank != 0:
        return tf.size(predicate) > 0
    if predicate.dtype == tf.string:
        return tf.strings.length(predicate) > 0
    return tf.cast(predicate, tf.bool)


PLANS = dict.fromkeys(CONDITIONS, plan_condition)
