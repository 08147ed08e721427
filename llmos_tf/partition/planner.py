"""Plans the program of a rank: how each value of a global graph is placed, and what is sent.

A plan is a list of steps in the order of the graph. It makes no ops: tests read it, and so does who
explains what a model sends.
"""

from collections.abc import Sequence
from functools import cached_property

from llmos_tf.partition import conditions, loops
from llmos_tf.partition.graph.choice import Choice, can_shard, reduced, whole
from llmos_tf.partition.graph.flat_graph import FlatGraph, Node, Value
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Partial, Placement, Sharded
from llmos_tf.partition.manual import Region, Storage
from llmos_tf.partition.plan import ANYTHING, Change, Compute, Given, Plan, Step, needed_plan
from llmos_tf.partition.rules import (
    ALWAYS,
    CREATIONS,
    DRAWN,
    LISTS,
    PASS_PARTS,
    PHILOX,
    RULES,
    is_elementwise,
    sharded_along,
)
from llmos_tf.partition.variable_ops import (
    ASSIGNMENTS,
    PYTHON,
    of_variable,
    refusal_of_python,
    refusal_of_use,
)

# Ops with functions: (planner, node) to the node as it is planned, and the choice.
_FUNCTIONALS = conditions.PLANS | loops.PLANS


class Planner:
    """Propagates placements through a graph.

    Args:
        graph: the global graph.
        inputs: the placement of each input; for a variable's handle its storage; None for what
            every rank has from outside.
        regions: manual regions of the graph, by the number in the attribute of their op.
        output_rows: whether an output that counts rows is returned as the rank's rows.
    """

    def __init__(
        self,
        graph: FlatGraph,
        inputs: Sequence[Placement | Storage | Given | None],
        regions: Sequence[Region] = (),
        output_rows: bool = True,
    ):
        self._graph = graph
        self._regions = regions
        self._output_rows = output_rows
        self._storages: dict[Value, Storage] = {}
        self._forms: dict[Value, list[Placement]] = {}
        # Values that are made when they are needed, as they are needed.
        self._lazy: dict[Value, Node] = {}
        # Those of random numbers, such as what a generator is given.
        self._drawn: set[Value] = set()
        # What was computed whole and counts rows: each rank goes on with its own.
        self._apart: set[Value] = set()
        self._steps: list[Step] = []
        self._without_rule: list[Node] = []
        self._written: set[int] = set()
        # Inputs that are given as they are needed.
        self._open: set[Value] = set()
        for value, given in zip(graph.inputs, inputs, strict=True):
            if isinstance(given, Storage):
                given = Given((REPLICATED,), given)
            elif not isinstance(given, Given):
                given = Given((REPLICATED if given is None else given,))
            if given.storage is not None:
                self._storages[value] = given.storage
            if given.is_open:
                self._open.add(value)
            self._forms[value] = list(given.forms)
        for node in graph.nodes:
            if node.type != "Placeholder":
                self._place(node)

    @cached_property
    def plan(self) -> Plan:
        """The plan in which what counts rows is returned as the rank's rows, if it is to be."""
        return self.planned([self._output_form(value) for value in self._graph.outputs])

    def planned(self, outputs: Sequence[Placement | None]) -> Plan:
        """Returns the plan; called once.

        Args:
            outputs: the placement in which each output is wanted; None for one that is not.

        Returns:
            The plan.
        """
        for value, placement in zip(self._graph.outputs, outputs, strict=True):
            if placement is not None:
                self._want(value, placement)
        return needed_plan(
            self._steps,
            self._graph.outputs,
            outputs,
            given=set(self._graph.inputs) - set(self._storages),
            without_rule=self._without_rule,
            written=frozenset(self._written),
        )

    def _output_form(self, value: Value) -> Placement | None:
        if value.dtype.name == "resource":
            return None
        if not self._output_rows or not value.dims or value.elements is not None:
            return REPLICATED
        first = value.dims[0]
        # What is not known to have another length counts rows, as what is made of sparse rows.
        is_rows = can_shard(value, 0) or first is None or not first.is_fixed
        return Sharded(0) if is_rows else REPLICATED

    # --- graphs of functions ----------------------------------------------------------------------

    def inner(self, graph: FlatGraph, inputs: Sequence[Given]) -> "Planner":
        """Returns the planner of the graph of a function.

        Args:
            graph: of the function.
            inputs: how its inputs are at hand.

        Returns:
            A planner that has found the placements.
        """
        fitting = [
            given._replace(forms=_fitting(value, given.forms))
            for value, given in zip(graph.inputs, inputs, strict=True)
        ]
        return Planner(graph, fitting, self._regions)

    def given(self, value: Value, is_open: bool = False) -> Given:
        """Returns how a value is given to a function.

        Args:
            value: what the function takes.
            is_open: whether it may be changed outside of the function.

        Returns:
            What is given.
        """
        forms = tuple(self._forms[value])
        if is_open and forms and REPLICATED not in forms and isinstance(forms[0], Partial):
            # Outside once, and not in each iteration.
            forms = (REPLICATED,)
        is_open = is_open or value in self._lazy or value in self._open
        return Given(forms, self._storages.get(value), is_open)

    def natural(self, value: Value) -> Placement | None:
        """Returns the placement in which a value is at hand; None where it is made as needed."""
        if self._forms[value]:
            return self._found(value)
        node = self._lazy.get(value)
        if node is not None and node.type == "OptionalFromValue":
            return reduced(self._found(node.inputs[0]))
        return None

    def storage_of(self, value: Value) -> Storage | None:
        """Returns the storage of the variable of a handle; None for what is no handle."""
        return self._storages.get(value)

    def add_handle(self, value: Value, storage: Storage) -> None:
        """Takes a value for the handle of a variable."""
        self._storages[value] = storage

    def is_used(self, value: Value) -> bool:
        """Returns whether anything takes a value of the graph."""
        return bool(value.users) or value in self._graph.outputs

    # --- ops -------------------------------------------------------------------------------------

    def _place(self, node: Node) -> None:
        if self._is_lazy(node):
            (output,) = node.outputs
            self._lazy[output] = node
            self._forms[output] = []
            if node.type in PHILOX or any(value in self._drawn for value in node.inputs):
                self._drawn.add(output)
            return
        if node.functions:
            node, choice = _FUNCTIONALS[node.type](self, node)
            self._written.update(*(plan.written for plan in node.plans))
            self._compute(node, choice)
            return
        self._compute(node, self._choice(node))

    def _compute(self, node: Node, choice: Choice) -> None:
        for value, placement in zip(node.inputs, choice.inputs, strict=True):
            if placement is not None:
                self._want(value, placement)
        self._steps.append(Compute(node, choice))
        for value, placement in zip(node.outputs, choice.outputs, strict=True):
            forms = self._forms.setdefault(value, [])
            if placement not in forms:
                forms.append(placement)
            if self._is_reduced_now(value, placement):
                self._want(value, REPLICATED)

    def _choice(self, node: Node) -> Choice:
        handle = node.inputs[0] if node.inputs else None
        storage = self._storages.get(handle)
        if storage is not None:
            if node.type in ASSIGNMENTS:
                self._written.add(id(storage))
            return of_variable(node, storage)
        if any(value in self._storages for value in node.inputs):
            raise ValueError(refusal_of_use(node))
        region = self._region(node)
        found = [self._found(value) for value in node.inputs]
        if region is not None:
            self._written.add(ANYTHING)
            return region.choice(node, found)
        if node.type == "Assert":
            # All ranks fail alike; the text shows a rank's rows.
            return Choice((REPLICATED, *map(reduced, found[1:])), ())
        if node.type.startswith(PYTHON):
            raise ValueError(refusal_of_python(node))
        rule = RULES.get(node.type)
        choice = None
        if rule is not None and (node.type in ALWAYS or set(found) != {REPLICATED}):
            choice = rule(node, found)
        if choice is None:
            if any(isinstance(placement, Sharded) for placement in found):
                self._without_rule.append(node)
                self._apart.update(node.outputs)
            if node.type in DRAWN:
                self._apart.update(node.outputs)
            choice = whole(node)
        return choice

    def _region(self, node: Node) -> Region | None:
        number = node.attr.get(Region.ATTRIBUTE)
        return None if number is None else self._regions[number.i]

    # --- values ----------------------------------------------------------------------------------

    def _found(self, value: Value) -> Placement:
        """The placement in which a value is best used."""
        is_apart = value in self._apart or (value in self._drawn and not self._forms[value])
        if is_apart and value.rank and value.rank > 1 and can_shard(value, 0):
            return Sharded(0)
        return self._at_hand(value)

    def _at_hand(self, value: Value) -> Placement:
        """The placement in which a value is there; the reduced one where there is one."""
        forms = self._forms[value]
        if not forms or (isinstance(forms[0], Partial) and REPLICATED in forms):
            return REPLICATED
        return forms[0]

    def _is_reduced_now(self, value: Value, placement: Placement) -> bool:
        """Whether parts are reduced where they are made: else each user might reduce them."""
        if not isinstance(placement, Partial):
            return False
        if placement != PARTIAL:
            return True
        return any(
            node.type not in PASS_PARTS and self._region(node) is None for node in value.users
        )

    def _is_lazy(self, node: Node) -> bool:
        """Whether an op makes rows of what every rank has, so that a rank can make its own."""
        if node.type in LISTS:
            return True
        if len(node.outputs) != 1 or node.is_stateful or node.outputs[0].dims is None:
            return False
        if not any(can_shard(node.outputs[0], dim) for dim in range(len(node.outputs[0].dims))):
            return False
        found = [self._at_hand(value) for value in node.inputs]
        if set(found) != {REPLICATED} or any(value in self._apart for value in node.inputs):
            return False
        if node.type in CREATIONS:
            return True
        return is_elementwise(node.type) and any(
            value in self._lazy or value in self._open for value in node.inputs
        )

    def _want(self, value: Value, placement: Placement) -> None:
        """Has a value at hand in a placement."""
        forms = self._forms[value]
        if placement in forms:
            return
        if value in self._open:
            forms.append(placement)
            return
        if value in self._lazy:
            choice = self._lazy_choice(self._lazy[value], placement)
            if choice is not None:
                self._compute(self._lazy[value], choice)
                return
            if not forms:
                self._compute(self._lazy[value], whole(self._lazy[value]))
                forms = self._forms[value]
                if placement in forms:
                    return
        source = forms[0]
        if REPLICATED in forms:
            source = REPLICATED
        elif placement != REPLICATED and not (source == PARTIAL and placement == PARTIAL):
            # Each change is to the whole value or from it.
            self._want(value, REPLICATED)
            source = REPLICATED
        self._steps.append(Change(value, source, placement))
        forms.append(placement)

    def _lazy_choice(self, node: Node, placement: Placement) -> Choice | None:
        if not isinstance(placement, Sharded):
            return None
        if node.type in CREATIONS:
            return CREATIONS[node.type](node, placement.dim)
        return sharded_along(node, placement.dim)


def _fitting(value: Value, forms: Sequence[Placement]) -> tuple[Placement, ...]:
    """The placements that an input of a function can have, where it knows less than the caller."""
    is_empty_list = value.elements is not None and value.elements.shapes is None
    kept = [
        form
        for form in forms
        if not isinstance(form, Sharded) or can_shard(value, form.dim) or is_empty_list
    ]
    return tuple(kept) if kept or not forms else (REPLICATED,)
