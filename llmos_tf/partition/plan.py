"""The plan of a rank's program: its steps, and what it takes and returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmos_tf.partition.graph.choice import Choice
from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import REPLICATED, Placement
from llmos_tf.partition.manual import Region, Storage

# Among the variables that a plan writes: any variable.
ANYTHING = -1


class Compute(NamedTuple):
    """An op, as every rank runs it."""

    node: Node
    choice: Choice

    @property
    def acts(self) -> bool:
        """Whether the op does more than compute, and so is run whether it is needed or not."""
        if self.node.functions:
            return any(plan.acts for plan in self.node.plans)
        is_read = self.node.type == "ReadVariableOp"
        return Region.ATTRIBUTE in self.node.attr or (self.node.is_stateful and not is_read)


class Change(NamedTuple):
    """A change of the placement of a value."""

    value: Value
    source: Placement
    target: Placement


Step = Compute | Change


class Given(NamedTuple):
    """An input of a function's graph, as the graph around it has it.

    Args:
        forms: the placements in which it is at hand.
        storage: of a variable's handle.
        is_open: whether it is also given in any other placement, to whoever asks.
    """

    forms: tuple[Placement, ...]
    storage: Storage | None = None
    is_open: bool = False


@dataclass
class Plan:
    """The steps of a rank's program.

    Args:
        steps: in the order in which they are run.
        outputs: the placement in which each output of the graph is returned; None for one that is
            not returned.
        without_rule: ops that are computed whole although an input was sharded.
        inputs: inputs of the graph, and placements in which they are needed.
        acts: whether it does more than compute its outputs.
        written: the `id`s of the storages of variables that it writes; with `ANYTHING` where any
            variable may be written.
    """

    steps: list[Step]
    outputs: list[Placement | None]
    without_rule: list[Node] = field(default_factory=list)
    inputs: list[tuple[Value, Placement]] = field(default_factory=list)
    acts: bool = False
    written: frozenset[int] = frozenset()

    @property
    def changes(self) -> list[Change]:
        """The changes of placement, most of which send something."""
        return [step for step in self.steps if isinstance(step, Change)]

    def with_inner(self) -> list["Plan"]:
        """Returns the plan, and those of the functions in it."""
        nodes = [step.node for step in self.steps if isinstance(step, Compute)]
        return [self, *(x for node in nodes for plan in node.plans for x in plan.with_inner())]

    @property
    def communicates(self) -> bool:
        """Whether ranks may have to meet in it."""
        return any(
            step.source != REPLICATED if isinstance(step, Change) else step.choice.emit is not None
            for step in self.steps
        )


def needed_plan(
    steps: Sequence[Step],
    returned: Sequence[Value],
    outputs: Sequence[Placement | None],
    given: set[Value],
    without_rule: list[Node],
    written: frozenset[int],
) -> Plan:
    """Returns the plan of those steps that make what is returned, or change something.

    Args:
        steps: in the order in which they are run.
        returned: the outputs of the graph.
        outputs: their placements.
        given: inputs of the graph that are no handles of variables.
        without_rule: as in `Plan`.
        written: as there.

    Returns:
        The plan.
    """
    wanted = dict.fromkeys(zip(returned, outputs, strict=True))
    kept: list[Step] = []
    made: set[tuple[Value, Placement]] = set()
    acts = False
    for step in reversed(steps):
        if isinstance(step, Change):
            if (step.value, step.target) in wanted:
                wanted[step.value, step.source] = None
                made.add((step.value, step.target))
                kept.append(step)
            continue
        node, choice = step
        own = set(zip(node.outputs, choice.outputs, strict=True))
        acts = acts or step.acts
        if step.acts or any(found in wanted for found in own):
            wanted.update(dict.fromkeys(zip(node.inputs, choice.inputs, strict=True)))
            made |= own
            kept.append(step)
    inputs = [
        (value, placement)
        for value, placement in wanted
        if value in given and placement is not None and (value, placement) not in made
    ]
    return Plan(kept[::-1], list(outputs), without_rule, inputs, acts, written)
