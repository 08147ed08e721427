"""What the ops of traced functions send, counted as often as they run."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import tensorflow as tf

from llmos_tf.collectives.annotations import Sent, branches_of, sent_by, turns_of
from llmos_tf.graph.trip_count import LOOPS, LoopTurns, ancestors

# How often each collective runs. Fractions, as a branch may be taken in some turns of a loop.
Tally = Counter[Sent]

_BRANCHES = ("If", "StatelessIf", "Case", "StatelessCase")


class TracedFunctions:
    """A concrete function and all that it calls, as TensorFlow runs them.

    An op runs if a result or an effect of its function depends on it; the others are pruned.
    Functions are looked into by their calls. Of loops the number of turns is noted on them
    (`llmos_tf.collectives.annotations`), or follows from constants. Of a condition the branch
    counts that sends more, unless it is noted how often each is taken.

    Args:
        concrete: the function.
    """

    def __init__(self, concrete: tf.types.experimental.ConcreteFunction):
        library = concrete.graph.as_graph_def().library.function
        self._functions = {function.signature.name: function for function in library}
        self._top = concrete.function_def
        self._loop_turns = LoopTurns(self._functions)
        self._tallies: dict[str, Tally] = {}

    def tallies(self, devices: Iterable[str]) -> dict[str, Tally]:
        """Returns what is sent by the programs of devices.

        Loops around a program are steps, of which one counts.

        Args:
            devices: full names.

        Returns:
            By device, for those on which a function is called.
        """
        return self._on_devices(self._top, {_canonical(device): device for device in devices})

    def _on_devices(self, function: Any, devices: Mapping[str, str]) -> dict[str, Tally]:
        found: dict[str, Tally] = {}
        for node in _live_nodes(function):
            callees = [self._functions[name] for name in _called(node) if name in self._functions]
            device = devices.get(_canonical(node.device)) if callees else None
            if device is not None:
                found[device] = _sum([found.get(device, Tally()), self._of_node(function, node)])
                continue
            inside = [self._on_devices(callee, devices) for callee in callees]
            larger = max(inside, default={}, key=lambda tallies: sum(map(_wire, tallies.values())))
            for device, tally in larger.items() if node.op in _BRANCHES else _items(inside):
                found[device] = _sum([found.get(device, Tally()), tally])
        return found

    def _of_function(self, name: str) -> Tally:
        if name not in self._functions:
            return Tally()
        if name not in self._tallies:
            function = self._functions[name]
            nodes = _live_nodes(function)
            self._tallies[name] = _sum(self._of_node(function, node) for node in nodes)
        return self._tallies[name]

    def _of_node(self, function: Any, node: Any) -> Tally:
        sent = sent_by(node)
        if sent is not None:
            return Tally({sent: Fraction(1)})
        callees = [self._of_function(name) for name in _called(node)]
        if not any(callees):
            return Tally()
        if node.op in LOOPS:
            turns = self._turns(function, node)
            return _times(turns, self._of_function(node.attr["body"].func.name))
        if node.op in _BRANCHES:
            return _of_branches(node, callees)
        return _sum(callees)

    def _turns(self, function: Any, node: Any) -> int:
        turns = turns_of(node)
        if turns is None:
            turns = self._loop_turns.count(function, node)
        if turns is None:
            raise ValueError(
                f"The loop {node.name} sends between ranks, and how often it turns depends on more "
                "than constants. Loop over tf.range of a Python number."
            )
        return turns


def _called(node: Any) -> Iterator[str]:
    """Names of the functions that a node calls; of a condition one for each branch, in order."""
    # Of an `If` in this order, which is that of the protocol buffer's map by chance only.
    for key in sorted(node.attr, reverse=True):
        value = node.attr[key]
        if value.HasField("func"):
            yield value.func.name
        yield from (function.name for function in value.list.func)


def _of_branches(node: Any, tallies: list[Tally]) -> Tally:
    counts = branches_of(node)
    if counts is None:
        return max(tallies, key=_wire)
    shares = (Fraction(count, sum(counts)) for count in counts)
    return _sum(_times(share, tally) for share, tally in zip(shares, tallies, strict=True))


def _wire(tally: Tally) -> Fraction:
    return sum((times * sent.wire for sent, times in tally.items()), Fraction(0))


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.update(tally)
    return total


def _times(times: int | Fraction, tally: Tally) -> Tally:
    return Tally({sent: times * count for sent, count in tally.items()})


def _items(tallies: Iterable[dict[str, Tally]]) -> Iterator[tuple[str, Tally]]:
    for by_device in tallies:
        yield from by_device.items()


def _canonical(device: str) -> str:
    return tf.DeviceSpec.from_string(device).to_string() if device else ""


def _live_nodes(function: Any) -> list[Any]:
    """The nodes on which a result or an effect of a function depends."""
    return ancestors(function, [*function.ret.values(), *function.control_ret.values()])
