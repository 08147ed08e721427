"""How often a loop of a traced function turns, where that follows from constants.

What a loop's condition depends on is mostly a counter and its limit, which no turn computes of
anything else. So these variables alone are followed, turn by turn, as `tf.range` and most uses of
`tf.while_loop` have them.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tensorflow as tf

LOOPS = ("While", "StatelessWhile")
# Of a loop whose condition never ends it.
_MAX_TURNS = 2**20


class LoopTurns:
    """Counts turns.

    Args:
        functions: `FunctionDef`s by name, in which loops find condition and body.
    """

    def __init__(self, functions: Mapping[str, Any]):
        self._functions = functions

    def count(self, function: Any, node: Any) -> int | None:
        """Returns how often a loop turns.

        Args:
            function: the `FunctionDef` in which it is.
            node: its `NodeDef`.

        Returns:
            The number; None where it depends on something else than constants.
        """
        condition = self._functions[node.attr["cond"].func.name]
        body = self._functions[node.attr["body"].func.name]
        (test,) = condition.ret.values()
        results = [body.ret[argument.name] for argument in body.signature.output_arg]
        counted = self._counted(condition, body, test, results)
        values = {i: self._initial(function, node.input[i]) for i in counted}
        if None in values.values():
            return None
        goes_on = _Evaluation(condition, [test], counted)
        turn = _Evaluation(body, [results[i] for i in counted], counted)
        if not (goes_on.is_possible and turn.is_possible):
            return None
        for turns in range(_MAX_TURNS):
            if not goes_on(values.values())[0]:
                return turns
            values = dict(zip(counted, turn(values.values()), strict=True))
        return None

    def _counted(self, condition: Any, body: Any, test: str, results: list[str]) -> list[int]:
        """The loop's variables by which its condition is decided, in this turn or a later one."""
        found = set(_arguments(condition, [test]))
        while True:
            more = found.union(_arguments(body, [results[i] for i in found]))
            if more == found:
                return sorted(found)
            found = more

    def _initial(self, function: Any, name: str) -> Any:
        """The value of a variable before the loop."""
        nodes = {node.name: node for node in function.node_def}
        source = nodes.get(node_name(name))
        if source is not None and source.op in LOOPS and name.endswith(":0"):
            # The loop of a gradient turns as often as the loop before it, which counts its turns.
            return self.count(function, source)
        evaluation = _Evaluation(function, [name], [])
        return evaluation([])[0] if evaluation.is_possible else None


class _Evaluation:
    """Computes tensors of a function by themselves, of some of its arguments.

    Args:
        function: a `FunctionDef`.
        names: of the tensors.
        arguments: numbers of the arguments that are given.
    """

    def __init__(self, function: Any, names: list[str], arguments: list[int]):
        nodes = _computing(function, names)
        given = [function.signature.input_arg[i] for i in arguments]
        known = {node.name for node in nodes} | {argument.name for argument in given}
        used = _used(names, nodes)
        # Not by calls, of which the graph here would have to have the functions.
        self.is_possible = used <= known and not any(map(_is_call, nodes))
        self._names = [_in_graph(name) for name in names]
        self._definition = tf.compat.v1.GraphDef()
        self._feeds = [f"{argument.name}:0" for argument in given]
        for argument in given:
            placeholder = self._definition.node.add(name=argument.name, op="Placeholder")
            placeholder.attr["dtype"].type = argument.type
        for node in nodes:
            copy = self._definition.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [_in_graph(name) for name in _data_inputs(node)]
        self._session: tf.compat.v1.Session | None = None

    def __call__(self, values: Iterable[Any]) -> list[Any]:
        if self._session is None:
            with tf.Graph().as_default() as graph:
                tf.compat.v1.import_graph_def(self._definition, name="")
            self._session = tf.compat.v1.Session(graph=graph)
        return self._session.run(self._names, dict(zip(self._feeds, values, strict=True)))


def ancestors(
    function: Any, names: Iterable[str], inputs: Callable[[Any], Iterable[str]] | None = None
) -> list[Any]:
    """Returns the nodes by which tensors of a function are computed, or after which they are.

    Args:
        function: a `FunctionDef`.
        names: as its nodes name their inputs: "node:output:0", "^node" or an argument.
        inputs: of a node, those to follow; None for all.

    Returns:
        `NodeDef`s; an argument is none.
    """
    nodes = {node.name: node for node in function.node_def}
    found: dict[str, Any] = {}
    unfinished = [node_name(name) for name in names]
    while unfinished:
        name = unfinished.pop()
        if name in found or name not in nodes:
            continue
        node = found[name] = nodes[name]
        unfinished += map(node_name, node.input if inputs is None else inputs(node))
    return list(found.values())


def node_name(name: str) -> str:
    """Returns the node, or the argument, of an input's name.

    Args:
        name: as of `ancestors`.

    Returns:
        The name of the node.
    """
    return name.lstrip("^").split(":")[0]


def _computing(function: Any, names: Iterable[str]) -> list[Any]:
    """The nodes of which tensors are computed, without what they only wait for."""
    return ancestors(function, names, _data_inputs)


def _data_inputs(node: Any) -> list[str]:
    return [name for name in node.input if not name.startswith("^")]


def _used(names: Iterable[str], nodes: Iterable[Any]) -> set[str]:
    return {node_name(name) for name in (*names, *(x for n in nodes for x in _data_inputs(n)))}


def _arguments(function: Any, names: list[str]) -> list[int]:
    """Numbers of the arguments of which tensors are computed."""
    used = _used(names, _computing(function, names))
    return [i for i, argument in enumerate(function.signature.input_arg) if argument.name in used]


def _is_call(node: Any) -> bool:
    return any(value.HasField("func") or value.list.func for value in node.attr.values())


def _in_graph(name: str) -> str:
    """The name in a graph of what a function names "node:output:0", of nodes with one output."""
    return f"{node_name(name)}:{name.split(':')[-1] if ':' in name else 0}"
