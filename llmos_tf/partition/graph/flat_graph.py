"""The graph of a traced function as one list of ops, with the shapes that TensorFlow infers for it.

Functions that are called stand in the place of their call. Conditions and loops stay ops, whose
functions have flat graphs of their own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.partition.graph.dims import NOMINAL_ROWS, Dim, Dims
from llmos_tf.partition.graph.inference import FUNCTIONALS, Inference
from llmos_tf.partition.graph.known import Elements, Known, nominal_shapes

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
# What refers to the op that a function is placed with, and the shapes of another batch.
_DROPPED_ATTRIBUTES = ("_class", "_gradient_op_type", "_output_shapes")


@dataclass(eq=False)
class Value:
    """An output of an op.

    Args:
        node: the op.
        index: of the output.
        dtype: its type.
        dims: its dimensions, or of a tensor list those of its elements; None where not even their
            number is known.
        tensors: the output in the graph of each inference.
        elements: those of a tensor list or of an optional.
    """

    node: "Node"
    index: int
    dtype: tf.DType
    dims: Dims | None
    tensors: tuple[tf.Tensor, ...]
    elements: Elements | None = None
    users: list["Node"] = field(default_factory=list)

    @property
    def rank(self) -> int | None:
        """The number of dimensions, where it is known."""
        return None if self.dims is None else len(self.dims)

    @property
    def known(self) -> Known:
        """What is known of it, without its value."""
        return Known(tuple(x.shape for x in self.tensors), elements=self.elements)

    @cached_property
    def constants(self) -> tuple[np.ndarray, ...] | None:
        """The value in each inference, where it follows from the graph; else None."""
        if self.node.type == "Const":
            value = tf.make_ndarray(self.node.attr["value"].tensor)
            return (value,) * len(self.tensors)
        if self.node.type == "ConcatOffset":
            return _concat_offset(self.node, self.index)
        if self.node.type == "ShapeN":
            return _shapes(self.node.inputs[self.index], self.dtype)
        values = tuple(map(_internal.evaluated_constant, self.tensors))
        return None if any(value is None for value in values) else values

    @property
    def constant(self) -> np.ndarray | None:
        """The value, where it follows from the graph and is the same for every batch."""
        values = self.constants
        if values is None:
            return None
        first = values[0]
        # What is not a number equals nothing.
        is_one = all(other is first or np.array_equal(other, first) for other in values)
        return first if is_one else None


@dataclass(eq=False)
class Node:
    """An op.

    Args:
        name: unique in the flat graph.
        type: name of the op's definition.
        attr: its attributes.
        inputs: what it takes.
        outputs: what it makes.
        op: the op in the graph of the first inference.
        functions: the flat graphs of the branches of a condition, or of what a loop asks and does.
        plans: those of the functions, once they are planned.
    """

    name: str
    type: str
    attr: dict[str, Any]
    inputs: list[Value]
    op: tf.Operation
    functions: tuple["FlatGraph", ...] = ()
    outputs: list[Value] = field(default_factory=list)
    plans: Sequence[Any] = ()

    @property
    def is_stateful(self) -> bool:
        """Whether it does more than compute its outputs."""
        return self.op.op_def.is_stateful

    def int_attr(self, name: str) -> int:
        """Returns an integer attribute."""
        return self.attr[name].i

    def bool_attr(self, name: str) -> bool:
        """Returns a boolean attribute."""
        return self.attr[name].b

    def str_attr(self, name: str) -> str:
        """Returns a text attribute."""
        return self.attr[name].s.decode()


def _shapes(value: Value, dtype: tf.DType) -> tuple[np.ndarray, ...] | None:
    """The shape of a value in each inference, where it is known."""
    if not all(x.shape.is_fully_defined() for x in value.tensors):
        return None
    return tuple(np.array(x.shape, dtype.as_numpy_dtype) for x in value.tensors)


def _concat_offset(node: Node, index: int) -> tuple[np.ndarray, ...] | None:
    """Where an input of a concatenation begins; TensorFlow does not evaluate that by itself."""
    axis, *shapes = (value.constants for value in node.inputs)
    if axis is None or any(shape is None for shape in shapes[: index + 1]):
        return None
    found = []
    for i, along in enumerate(axis):
        offset = np.zeros_like(shapes[0][i])
        offset[along] = sum(int(shape[i][along]) for shape in shapes[:index])
        found.append(offset)
    return tuple(found)


class FlatGraph:
    """The ops of a function's graph in the order in which they were traced.

    Args:
        graph: of a traced function.
        inputs: for each of its inputs, whether its first dimension counts rows of the batch; or
            what is known of it.
        num_rows: how many rows the batch has, where the trace knows; else None. Or the two numbers
            for which shapes are inferred.
    """

    def __init__(
        self,
        graph: tf.Graph,
        inputs: Sequence[bool | Known],
        num_rows: int | tuple[int, int] | None = None,
    ):
        definition = tf.compat.v1.GraphDef()
        definition.versions.CopyFrom(graph.as_graph_def().versions)
        self._functions: set[str] = set()
        # Where the functions of an op are found, by its name.
        self._owners: dict[str, tf.Graph] = {}
        aliases: dict[str, str] = {}
        self._inline(graph, "", aliases, definition)
        _sort(definition)
        inference = self._inferred_for(num_rows, definition, graph, inputs)
        self.graph = inference.graphs[0]
        self.nodes = list(_nodes(definition, inference, self._sizes))
        made = {f"{node.name}:{x.index}": x for node in self.nodes for x in node.outputs}
        self.inputs = [made[f"{x.op.name}:0"] for x in graph.inputs]
        self.outputs = [made[_resolved(x.name, aliases)] for x in graph.outputs]

    def _inferred_for(
        self,
        num_rows: int | tuple[int, int] | None,
        definition: Any,
        graph: tf.Graph,
        inputs: Sequence[bool | Known],
    ) -> Inference:
        """The shapes for the fewest rows that the graph allows."""
        if num_rows is not None:
            self._sizes = num_rows if isinstance(num_rows, tuple) else (num_rows, num_rows)
            return self._inferred(definition, graph, inputs)
        for self._sizes in NOMINAL_ROWS[:-1]:
            with contextlib.suppress(ValueError):
                return self._inferred(definition, graph, inputs)
        self._sizes = NOMINAL_ROWS[-1]
        return self._inferred(definition, graph, inputs)

    def _inferred(
        self, definition: Any, graph: tf.Graph, inputs: Sequence[bool | Known]
    ) -> Inference:
        def infer(has_lengths: bool) -> Inference:
            known = {
                x.op.name: given
                if isinstance(given, Known)
                else Known(nominal_shapes(x.shape, given, self._sizes, has_lengths))
                for x, given in zip(graph.inputs, inputs, strict=False)
            }
            return Inference(
                definition,
                known,
                self._owners,
                lambda inner, inputs: FlatGraph(inner, inputs, self._sizes),
            )

        try:
            return infer(True)
        except ValueError:
            if all(isinstance(given, Known) for given in inputs):
                raise
            # Lengths that are not known need not be those that were taken.
            return infer(False)

    def _inline(
        self, graph: tf.Graph, prefix: str, aliases: dict[str, str], definition: Any
    ) -> None:
        """Adds the nodes of a graph under a prefix of their names; `aliases` maps tensors."""
        own = graph.as_graph_def()
        for function in own.library.function:
            if function.signature.name not in self._functions:
                self._functions.add(function.signature.name)
                definition.library.function.add().CopyFrom(function)
        definition.library.gradient.extend(own.library.gradient)
        for node in own.node:
            name = prefix + node.name
            inputs = [
                _resolved(prefix + _with_index(x), aliases)
                for x in node.input
                if not x.startswith("^")
            ]
            if node.op in _CALLS:
                self._inline_call(graph, node, name, inputs, aliases, definition)
            elif node.op == "VariableShape" and _add_shape(graph, node, name, definition):
                pass
            elif f"{name}:0" not in aliases and node.op != "NoOp":
                added = definition.node.add(name=name, op=node.op, input=inputs)
                if node.op in FUNCTIONALS:
                    self._owners[name] = graph
                for key, value in node.attr.items():
                    if key not in _DROPPED_ATTRIBUTES:
                        added.attr[key].CopyFrom(value)
                if node.op == "ReadVariableOp":
                    read = graph.get_operation_by_name(node.name).outputs[0]
                    added.attr["shape"].shape.CopyFrom(read.shape.as_proto())

    def _inline_call(self, graph, node, name, inputs, aliases, definition) -> None:
        called = _internal.graph_of_function(graph, node.attr["f"].func.name)
        prefix = f"{name}/"
        for inner, outer in zip(called.inputs, inputs, strict=True):
            aliases[prefix + inner.name] = outer
        self._inline(called, prefix, aliases, definition)
        for i, output in enumerate(called.outputs):
            aliases[f"{name}:{i}"] = _resolved(prefix + output.name, aliases)


def _add_shape(graph: tf.Graph, node: Any, name: str, definition: Any) -> bool:
    """Adds the shape of a variable as a constant, where it is known."""
    shape = _internal.shape_of_variable(graph.get_operation_by_name(node.name).inputs[0])
    if not shape.is_fully_defined():
        return False
    dtype = tf.as_dtype(node.attr["out_type"].type or tf.int32)
    added = definition.node.add(name=name, op="Const")
    added.attr["dtype"].type = dtype.as_datatype_enum
    added.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(shape.as_list(), dtype))
    return True


def _with_index(name: str) -> str:
    return name if ":" in name else f"{name}:0"


def _resolved(name: str, aliases: dict[str, str]) -> str:
    while name in aliases:
        name = aliases[name]
    return name


def _sort(definition: Any) -> None:
    """Puts ops before those that they take values of, where a gradient was put in afterwards."""
    nodes = {node.name: node for node in definition.node}
    done: dict[str, Any] = {}
    waiting = list(reversed(definition.node))
    while waiting:
        node = waiting[-1]
        missing = [name.split(":")[0] for name in node.input if name.split(":")[0] not in done]
        if node.name in done or not missing:
            done[node.name] = node
            waiting.pop()
        waiting += [nodes[name] for name in reversed(missing)]
    ordered = [tf.compat.v1.NodeDef.FromString(x.SerializeToString()) for x in done.values()]
    del definition.node[:]
    definition.node.extend(ordered)


# --- shapes ---------------------------------------------------------------------------------------


def _nodes(definition: Any, inference: Inference, sizes: tuple[int, int]) -> Iterator[Node]:
    made: dict[str, Value] = {}
    for given in definition.node:
        ops = inference.operations(given.name)
        inputs = [made[name] for name in given.input]
        functions = inference.functions.get(given.name, ())
        node = Node(given.name, given.op, dict(given.attr), inputs, ops[0], functions)
        for value in dict.fromkeys(inputs):
            value.users.append(node)
        for i, output in enumerate(ops[0].outputs):
            name = f"{given.name}:{i}"
            tensors = inference.tensors(name)
            elements = inference.elements(name) if output.dtype == tf.variant else None
            shapes = [x.shape for x in tensors] if elements is None else elements.shapes
            dims = None if shapes is None else _dims(shapes, sizes)
            value = Value(node, i, output.dtype, dims, tensors, elements)
            node.outputs.append(value)
            made[name] = value
        yield node


def _dims(shapes: Sequence[tf.TensorShape], sizes: tuple[int, int]) -> Dims | None:
    if any(shape.rank is None for shape in shapes) or len({shape.rank for shape in shapes}) > 1:
        return None
    return tuple(
        None if None in lengths else Dim(lengths[0], lengths[1], lengths[0] == lengths[2], sizes)
        for lengths in zip(*(shape.as_list() for shape in shapes), strict=True)
    )
