"""Loops: a variable of a loop has one placement in all iterations, found by trying.

What the body does not change is taken in the placements in which it is needed, and changed outside
of the loop.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from llmos_tf.partition.graph.choice import Choice, can_shard, first_place
from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.inference import LOOPS
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Placement, Sharded


def plan_loop(planner: Any, node: Node) -> tuple[Node, Choice]:
    """Plans a loop.

    Args:
        planner: of the graph in which it is.
        node: the loop.

    Returns:
        The node with an input for each placement in which a value is needed, and the choice.
    """
    return _Loop(planner, node).planned()


class _Loop:
    """A loop that is being planned."""

    def __init__(self, planner: Any, node: Node):
        self._planner = planner
        self._node = node
        self._cond, self._body = node.functions
        self._varying = [
            i
            for i, (own, output) in enumerate(
                zip(self._body.inputs, self._body.outputs, strict=True)
            )
            if _origin(output) is not own
        ]
        self._placements: dict[int, Placement | None] = {
            i: planner.natural(node.inputs[i]) for i in self._varying
        }
        self._fixed: set[int] = set()
        for i, placement in self._placements.items():
            self._placements[i] = self._allowed(i, placement)

    def planned(self) -> tuple[Node, Choice]:
        """Returns the node and its choice."""
        body = self._settled()
        outputs = [self._placements.get(i) for i in range(len(self._node.inputs))]
        body_plan = body.planned(outputs)
        cond_plan = self._planner.inner(self._cond, self._given()).planned([REPLICATED])
        needed = [(i, self._placements[i]) for i in self._varying]
        for flat, plan in ((self._body, body_plan), (self._cond, cond_plan)):
            for value, placement in plan.inputs:
                found = (flat.inputs.index(value), placement)
                if found not in needed and found[0] not in self._placements:
                    needed.append(found)
        returned = self._invariant_outputs()
        needed += [found for found in returned.values() if found not in needed]
        expanded = replace(
            self._node,
            inputs=[self._node.inputs[i] for i, _ in needed],
            plans=[cond_plan, body_plan],
        )
        results = [*outputs]
        for i, (_, placement) in returned.items():
            results[i] = placement
        emit = _emission_of(self._varying, needed, returned, (cond_plan, body_plan))
        return expanded, Choice(tuple(p for _, p in needed), tuple(results), emit)

    def _settled(self) -> Any:
        """Tries placements until the body keeps them; returns the body's planner."""
        while True:
            body = self._planner.inner(self._body, self._given())
            is_settled = True
            for i in self._varying:
                after = self._after(i, body)
                if after != self._placements[i]:
                    self._placements[i] = after
                    is_settled = False
            if is_settled:
                return body

    def _given(self) -> list[Any]:
        return [
            self._planner.given(value, is_open=True)
            if i not in self._placements
            else _given_as(self._planner.given(value), self._placements[i])
            for i, value in enumerate(self._node.inputs)
        ]

    def _after(self, i: int, body: Any) -> Placement:
        """The placement of a variable, after what the body has made of the one that was tried."""
        before, now = self._placements[i], body.natural(self._body.outputs[i])
        if before is None:
            # Whatever it is made as, the body has asked for it so.
            asked = now or body.natural(self._body.inputs[i]) or self._of_rows(i)
            return self._allowed(i, asked)
        if now is None or now == before or i in self._fixed:
            return before
        kinds = {before, now} - {REPLICATED}
        if len(kinds) > 1:
            self._fixed.add(i)
            return REPLICATED
        return self._allowed(i, kinds.pop())

    def _of_rows(self, i: int) -> Placement:
        dim = first_place(self._body.inputs[i])
        return REPLICATED if dim is None else Sharded(dim)

    def _allowed(self, i: int, placement: Placement | None) -> Placement | None:
        """The placement, or the one of every rank's own where a variable cannot have it."""
        if placement is None or placement == REPLICATED:
            return placement
        values = (self._body.inputs[i], self._body.outputs[i], self._node.outputs[i])
        if isinstance(placement, Sharded) and all(can_shard(x, placement.dim) for x in values):
            return placement
        if placement == PARTIAL and values[0].dtype != tf.variant:
            return placement
        self._fixed.add(i)
        return REPLICATED

    def _invariant_outputs(self) -> dict[int, tuple[int, Placement]]:
        """Inputs that the loop returns as they are, where somebody takes them from it."""
        returned = {}
        for i, output in enumerate(self._node.outputs):
            if i in self._placements:
                continue
            storage = self._planner.storage_of(self._node.inputs[i])
            if storage is not None:
                self._planner.add_handle(output, storage)
            elif self._planner.is_used(output):
                found = self._planner.natural(self._node.inputs[i]) or REPLICATED
                returned[i] = (i, found)
        return returned


def _given_as(given: Any, placement: Placement | None) -> Any:
    if placement is None:
        return given._replace(forms=(), is_open=True)
    return given._replace(forms=(placement,), is_open=False)


def _origin(value: Value) -> Value:
    while value.node.type == "Identity":
        value = value.node.inputs[0]
    return value


def _emission_of(
    varying: Sequence[int],
    needed: Sequence[tuple[int, Placement]],
    returned: dict[int, tuple[int, Placement]],
    plans: tuple[Any, Any],
):
    """Returns what makes the loop on a rank.

    Args:
        varying: inputs that the body changes, which come first among those that are needed.
        needed: inputs and their placements.
        returned: for outputs that are inputs, the input and its placement.
        plans: of the condition and of the body.

    Returns:
        The function, for `Choice`.
    """
    count = len(varying)
    cond_plan, body_plan = plans
    # A collective of one iteration must not meet that of the next.
    written = cond_plan.written | body_plan.written
    communicates = cond_plan.communicates or body_plan.communicates

    def emit(emission, node, tensors):
        cond, body = node.functions
        start, others = list(tensors[:count]), tensors[count:]
        shapes = [
            emission.static_shape(body.inputs[i], placement) for i, placement in needed[:count]
        ]

        def run(flat, plan, variables, inner):
            given = [
                (flat.inputs[i], placement, tensor)
                for (i, placement), tensor in zip(needed, [*variables, *others], strict=True)
            ]
            return inner.run(plan, given, flat.outputs)

        def asked(variables, inner=None):
            inner = inner or emission.nested(written)
            return tf.reshape(run(cond, cond_plan, variables, inner)[0], [])

        def done(variables):
            results = run(body, body_plan, variables, emission.nested(written))
            return [_shaped(results[i], shape) for i, shape in zip(varying, shapes, strict=True)]

        start = [_shaped(x, shape) for x, shape in zip(start, shapes, strict=True)]
        parallel = 1 if communicates else node.int_attr("parallel_iterations") or 10
        if cond_plan.communicates:
            # Ranks meet in the body, and not where TensorFlow asks whether to go on.
            *results, _ = tf.while_loop(
                lambda *variables: variables[-1],
                lambda *variables: [*(after := done(variables[:-1])), asked(after)],
                [*start, asked(start, emission.nested())],
                [*shapes, tf.TensorShape([])],
                parallel_iterations=parallel,
            )
        else:
            results = tf.while_loop(
                lambda *variables: asked(variables),
                lambda *variables: done(variables),
                start,
                shapes,
                parallel_iterations=parallel,
            )
        made: list[Any] = [None] * len(node.outputs)
        for i, result in zip(varying, results, strict=True):
            made[i] = result
        for i, found in returned.items():
            made[i] = tensors[needed.index(found)]
        return made

    return emit


def _shaped(x: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    x = tf.identity(x)
    x.set_shape(shape)
    return x


PLANS = dict.fromkeys(LOOPS, plan_loop)
