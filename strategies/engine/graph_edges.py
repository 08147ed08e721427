"""A program in phases, between which the devices of one process hand each other tensors.

Virtual CPU devices share a memory. A collective op copies what it is given several times, on each
device; an edge of the graph from one device to another copies nothing. So where all that a program
communicates is along one axis, over all devices of this process, it is cut at its collectives: each
device calls the part before them, the graph around adds up or concatenates what they return, once
for all devices, and each calls the part after them.

The collectives stay in the trace, where memory and traffic are counted. See docs/adr/0012.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from llmos_tf.graph.subgraph import Cut, GraphCuts, Ops

# A phase is a function on each device: where there are more, collectives are faster.
MAX_PHASES = 8


class Phases:
    """The functions into which a program is cut.

    Args:
        concrete: the traced program, with collectives over all devices.
        phase_of: the phase in which each op runs, by name.
    """

    def __init__(self, concrete: Any, phase_of: dict[str, int]):
        self._concrete = concrete
        graph = concrete.graph
        count = 1 + max(phase_of.values(), default=0)
        self._exchanges: list[list[_Exchange]] = [[] for _ in range(count)]
        in_phase: list[set[str]] = [set() for _ in range(count)]
        for op in graph.get_operations():
            if op.type in _EXCHANGES:
                self._exchanges[phase_of[op.name]].append(_Exchange.by(op))
            elif op.type == "Const":
                # Each phase has its own, of which TensorFlow knows that they are constant.
                for phase in {0, *(phase_of[user.name] for user in op.outputs[0].consumers())}:
                    in_phase[phase].add(op.name)
            elif op.type != "Placeholder":
                in_phase[phase_of[op.name]].add(op.name)
        for exchange in (one for some in self._exchanges for one in some):
            # What is received is not computed.
            in_phase[phase_of[exchange.received.op.name]].discard(exchange.received.op.name)
        cuts = GraphCuts(graph)
        # Each op is there once for each device.
        needed = cuts.needed()
        names = [mine & needed for mine in in_phase]
        outside = {inner.ref(): outer for outer, inner in graph.captures}
        self._cuts: list[Cut] = [
            cuts.cut(mine, _results_of(graph, mine, needed - mine, first=not phase), outside)
            for phase, mine in enumerate(names)
        ]

    @classmethod
    def of(cls, concrete: Any) -> "Phases | None":
        """Cuts a program.

        Args:
            concrete: the traced program.

        Returns:
            Its phases; None where it has too many, or communicates in another way, such as in a
            loop.
        """
        graph = concrete.graph
        functions = graph.as_graph_def().library.function
        if any(node.op.startswith("Collective") for f in functions for node in f.node_def):
            return None
        operations = graph.get_operations()
        if any(op.type.startswith("Collective") and op.type not in _EXCHANGES for op in operations):
            return None
        phase_of = _phases_of(operations)
        if max(phase_of.values(), default=0) >= MAX_PHASES:
            return None
        return cls(concrete, phase_of)

    def call(
        self,
        inputs: Sequence[Sequence[tf.Tensor]],
        captures_of: Callable[[Any, int], list[tf.Tensor]],
        devices: Sequence[str],
    ) -> list[Any]:
        """Calls the program on each device.

        Args:
            inputs: of the program, for each device.
            captures_of: of a function and a device's position, what it takes from outside.
            devices: names.

        Returns:
            What the program returns, for each device.
        """
        graph = self._concrete.graph
        arguments = graph.inputs[: len(inputs[0])]
        values = [
            {x.ref(): value for x, value in zip(arguments, mine, strict=True)} for mine in inputs
        ]
        for position, mine in enumerate(values):
            captured = captures_of(self._concrete, position)
            mine.update({x.ref(): y for (_, x), y in zip(graph.captures, captured, strict=True)})
        for cut, exchanges in zip(self._cuts, self._exchanges, strict=True):
            for position, device in enumerate(devices):
                captures = captures_of(cut.concrete, position)
                with tf.device(device):
                    values[position].update(cut.call(values[position], captures))
            for number, exchange in enumerate(exchanges):
                sent = [mine[exchange.sent.ref()] for mine in values]
                # In turn, so that all devices have some of the work.
                received = exchange.run(sent, devices, number % len(devices))
                for mine, value in zip(values, received, strict=True):
                    mine[exchange.received.ref()] = value
        return [self._packed(mine) for mine in values]

    def _packed(self, values: dict) -> Any:
        """What one device returns, in the program's structure."""
        structure = self._concrete.structured_outputs
        leaves = tf.nest.flatten(structure, expand_composites=True)
        outputs = iter(self._concrete.graph.outputs)
        flat = [None if leaf is None else values[next(outputs).ref()] for leaf in leaves]
        return tf.nest.pack_sequence_as(structure, flat, expand_composites=True)


def _phases_of(operations: Sequence[tf.Operation]) -> dict[str, int]:
    """The phase in which each op runs: how many collectives are before it, one after the other."""
    phase_of: dict[str, int] = {}
    unfinished = list(reversed(operations))
    while unfinished:
        op = unfinished[-1]
        # Collectives are put in a row, as those of several devices must be.
        in_a_row = op.type in _EXCHANGES
        before = [x.op for x in op.inputs]
        before += [x for x in op.control_inputs if not (in_a_row and x.type in _EXCHANGES)]
        missing = [x for x in before if x.name not in phase_of]
        if missing:
            unfinished += missing
            continue
        unfinished.pop()
        phase_of[op.name] = max(
            (phase_of[x.name] + (x.type in _EXCHANGES) for x in before), default=0
        )
    return phase_of


def _results_of(graph: tf.Graph, names: Ops, others: Ops, first: bool) -> list[tf.Tensor]:
    """What the ops of a phase make for others; constants only what is returned or sent."""
    returned = {x.ref() for x in graph.outputs}

    def is_result(op, x):
        if op.type == "Const":
            sends = any(user.type in _EXCHANGES for user in x.consumers())
            return first and (sends or x.ref() in returned)
        return x.ref() in returned or any(user.name in others for user in x.consumers())

    operations = [op for op in graph.get_operations() if op.name in names]
    return [x for op in operations for x in op.outputs if is_result(op, x)]


# --- what collectives do, of one tensor from each device ------------------------------------------


class _Exchange(NamedTuple):
    """A collective: `run` makes what each device receives of what each has sent.

    It is told the devices' names, and which of them is to do what is done once for all.
    """

    run: Callable[[list[tf.Tensor], Sequence[str], int], list[tf.Tensor]]
    sent: tf.Tensor
    received: tf.Tensor

    @classmethod
    def by(cls, op: tf.Operation) -> "_Exchange":
        """Returns what a collective op does."""
        users = op.outputs[0].consumers()
        if op.type == "CollectiveAllToAllV2" and [x.type for x in users] == ["Sum"]:
            axis = tf.get_static_value(users[0].inputs[1])
            if (
                axis is not None
                and axis.tolist() in (0, [0])
                and not users[0].get_attr("keep_dims")
            ):
                # How gradients are scattered: each device adds up what it is sent.
                return cls(_scatter, op.inputs[0], users[0].outputs[0])
        run = functools.partial(_EXCHANGES[op.type], op)
        return cls(run, op.inputs[0], op.outputs[0])


def _reduce(op, sent, devices, turn):
    kind = op.get_attr("merge_op").decode()
    with tf.device(devices[turn]):
        if kind == "Add":
            result = tf.add_n(sent)
        else:
            reduce = tf.reduce_max if kind == "Max" else tf.reduce_min
            result = reduce(tf.stack(sent), axis=0)
    return [result] * len(sent)


def _gather(op, sent, devices, turn):
    del op
    with tf.device(devices[turn]):
        return [tf.concat(sent, 0)] * len(sent)


def _swap(op, sent, devices, turn):
    del op, turn
    return [tf.stack(parts) for parts in _for_each_device(sent, devices)]


def _scatter(sent, devices, turn):
    del turn
    return [tf.add_n(parts) for parts in _for_each_device(sent, devices)]


def _for_each_device(sent: list[tf.Tensor], devices: Sequence[str]) -> Iterator[list[tf.Tensor]]:
    """The parts for each device, in the context of which they are used."""
    parts = []
    for x, device in zip(sent, devices, strict=True):
        with tf.device(device):
            parts.append(tf.unstack(x, len(sent)))
    for j, device in enumerate(devices):
        with tf.device(device):
            yield [mine[j] for mine in parts]


_EXCHANGES = {
    "CollectiveReduceV2": _reduce,
    "CollectiveGatherV2": _gather,
    "CollectiveAllToAllV2": _swap,
}
