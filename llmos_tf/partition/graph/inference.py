"""Shapes of a flat graph, by TensorFlow's own shape functions.

TensorFlow infers no shapes through functions: what a loop or a condition returns, and what is taken
from a tensor list, has none. So ops are imported up to such an op, what it returns is found in the
graphs of its functions, and the import continues with these shapes.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.partition.graph import elements as lists
from llmos_tf.partition.graph.known import (
    NUM_INFERENCES,
    Elements,
    Known,
    constants_of,
    joined_known,
)

# Attributes that name the functions of an op, by its type.
CONDITIONS = {
    "Case": ("branches",),
    "If": ("then_branch", "else_branch"),
    "StatelessCase": ("branches",),
    "StatelessIf": ("then_branch", "else_branch"),
}
LOOPS = {"StatelessWhile": ("cond", "body"), "While": ("cond", "body")}
FUNCTIONALS = CONDITIONS | LOOPS

# Makes the flat graph of a function's graph, of what is known of its inputs.
Flatten = Callable[[tf.Graph, Sequence[Known]], Any]


class Inference:
    """Infers the shapes of a graph definition for several batches; see `partition.dims`.

    Args:
        definition: the ops, each after those that it takes values of.
        inputs: what is known of the placeholders, by name.
        owners: the graph that an op with functions was taken from, by name.
        flatten: makes the flat graphs of functions.
    """

    def __init__(
        self,
        definition: Any,
        inputs: dict[str, Known],
        owners: dict[str, tf.Graph],
        flatten: Flatten,
    ):
        graphs = [tf.Graph() for _ in range(NUM_INFERENCES)]
        # Where no other length is unknown, the last inference would be the first one again.
        self._num_graphs = 3 if any(known.has_lengths for known in inputs.values()) else 2
        self.graphs = (*graphs[:2], graphs[2 if self._num_graphs > 2 else 0])
        # The flat graphs of the functions of an op, by its name.
        self.functions: dict[str, tuple[Any, ...]] = {}
        self._definition = definition
        self._inputs = inputs
        self._owners = owners
        self._flatten = flatten
        self._nodes = {node.name: node for node in definition.node}
        # A name that others begin with, as that of a loop, would be changed by a later import.
        self._names = {name: f"op{i}" for i, name in enumerate(self._nodes)}
        # Constants in the place of what is read from lists.
        self._read_values: dict[str, str] = {}
        self._elements = {name: known.elements for name, known in inputs.items()}
        self._elements = {f"{name}:0": x for name, x in self._elements.items() if x is not None}
        segment: list[Any] = []
        is_first = True
        for node in definition.node:
            segment.append(node)
            if node.op in lists.READS or node.op in lists.VALUES or node.op in FUNCTIONALS:
                self._import(segment, is_first)
                self._refine(node)
                segment, is_first = [], False
        self._import(segment, is_first)

    def tensors(self, name: str) -> tuple[tf.Tensor, ...]:
        """Returns an output in the graph of each inference.

        Args:
            name: of the output, with its index.

        Returns:
            The tensors.
        """
        name = self._own_name(name)
        return tuple(graph.get_tensor_by_name(name) for graph in self.graphs)

    def operations(self, name: str) -> tuple[tf.Operation, ...]:
        """Returns an op in the graph of each inference.

        Args:
            name: of the op.

        Returns:
            The ops.
        """
        return tuple(graph.get_operation_by_name(self._names[name]) for graph in self.graphs)

    def elements(self, name: str) -> Elements:
        """Returns what is known of the elements of a tensor list or of an optional.

        Args:
            name: of an output of type variant.

        Returns:
            What is known.
        """
        if name not in self._elements:
            node_name, index = name.split(":")
            node = self._nodes[node_name]
            self._elements[name] = lists.of_output(node, int(index), self.tensors, self.elements)
        return self._elements[name]

    def known(self, name: str, has_constants: bool = True) -> Known:
        """Returns what is known of an output.

        Args:
            name: of the output.
            has_constants: whether its value is looked for.

        Returns:
            What is known.
        """
        tensors = self.tensors(name)
        shapes = tuple(x.shape for x in tensors)
        if tensors[0].dtype == tf.variant:
            return Known(shapes, elements=self.elements(name))
        return Known(shapes, constants_of(tensors) if has_constants else None)

    # --- import ----------------------------------------------------------------------------------

    def _own_name(self, name: str) -> str:
        if name in self._read_values:
            return self._read_values[name]
        node, index = name.split(":")
        return f"{self._names[node]}:{index}"

    def _import(self, segment: list[Any], is_first: bool) -> None:
        own = {self._names[node.name] for node in segment}
        for i, graph in enumerate(self.graphs[: self._num_graphs]):
            part = tf.compat.v1.GraphDef(versions=self._definition.versions)
            if is_first:
                part.library.CopyFrom(self._definition.library)
            for node in segment:
                added = _add_with_shape(part, node, self._inputs.get(node.name), i)
                added.name = self._names[node.name]
                added.input[:] = map(self._own_name, added.input)
            taken = {x for node in part.node for x in node.input if x.split(":")[0] not in own}
            inputs = {name: graph.get_tensor_by_name(name) for name in taken}
            with graph.as_default():
                tf.graph_util.import_graph_def(part, input_map=inputs or None, name="")

    def _refine(self, node: Any) -> None:
        """Tells TensorFlow the shapes that an op returns."""
        if node.op in lists.VALUES and self._is_constant(node):
            return
        if node.op in FUNCTIONALS:
            found = self._of_condition(node) if node.op in CONDITIONS else self._of_loop(node)
        else:
            found = lists.read_shapes(node, self.tensors, self.elements)
        for index, shapes in found.items():
            for tensor, shape in zip(self.tensors(f"{node.name}:{index}"), shapes, strict=True):
                if tensor.shape.is_compatible_with(shape):
                    tensor.set_shape(shape)

    def _is_constant(self, node: Any) -> bool:
        """Whether what is read is known, as shapes are, of which a gradient has stored some."""
        index, constants = lists.value(node, self.elements)
        name = f"{node.name}:{index}"
        dtype = self.tensors(name)[0].dtype
        if constants is None or dtype == tf.variant:
            return False
        own_name = f"{self._names[node.name]}_value"
        for value, graph in zip(constants, self.graphs[: self._num_graphs], strict=False):
            with graph.as_default():
                tf.constant(value, dtype, name=own_name)
        self._read_values[name] = f"{own_name}:0"
        return True

    # --- functions -------------------------------------------------------------------------------

    def _function_graphs(self, node: Any) -> list[tf.Graph]:
        owner = self._owners[node.name]
        attributes = [node.attr[name] for name in FUNCTIONALS[node.op]]
        functions = [f for a in attributes for f in (a.list.func or [a.func])]
        return [_internal.graph_of_function(owner, function.name) for function in functions]

    def _flat(self, graph: tf.Graph, inputs: list[Known]) -> Any:
        # What was inferred need not be what the function is called with, as in a branch that is
        # taken for some lengths only.
        for less in (inputs, [x.without_constants() for x in inputs]):
            with contextlib.suppress(ValueError):
                return self._flatten(graph, less)
        return self._flatten(graph, [known.without_shapes() for known in inputs])

    def _of_condition(self, node: Any) -> dict[int, tuple[tf.TensorShape, ...]]:
        inputs = [self.known(name) for name in node.input[1:]]
        flat = [self._flat(graph, inputs) for graph in self._function_graphs(node)]
        self.functions[node.name] = tuple(flat)
        found = [
            joined_known([x.known for x in values])
            for values in zip(*(f.outputs for f in flat), strict=True)
        ]
        return self._noted(node, found)

    def _of_loop(self, node: Any) -> dict[int, tuple[tf.TensorShape, ...]]:
        cond, body = self._function_graphs(node)
        varies = loop_variables(body)
        inputs = [
            self.known(name, has_constants=not varies[i]) for i, name in enumerate(node.input)
        ]
        while True:
            flat = self._flat(body, inputs)
            after = [
                joined_known([known, value.known]) if varies[i] else known
                for i, (known, value) in enumerate(zip(inputs, flat.outputs, strict=True))
            ]
            if after == inputs:
                break
            inputs = after
        self.functions[node.name] = (self._flat(cond, inputs), flat)
        return self._noted(node, inputs)

    def _noted(self, node: Any, found: list[Known]) -> dict[int, tuple[tf.TensorShape, ...]]:
        for i, known in enumerate(found):
            if known.elements is not None:
                self._elements[f"{node.name}:{i}"] = known.elements
        return {i: known.shapes for i, known in enumerate(found)}


def loop_variables(body: tf.Graph) -> list[bool]:
    """Returns which inputs of a loop its body changes.

    Args:
        body: the graph of the body.

    Returns:
        For each input, False where the body returns it as it is.
    """
    return [
        _origin(output).op is not own.op
        for own, output in zip(body.inputs, body.outputs, strict=True)
    ]


def _origin(tensor: tf.Tensor) -> tf.Tensor:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _add_with_shape(part: Any, node: Any, known: Known | None, i: int) -> Any:
    """Adds a node as it is in inference `i`."""
    added = part.node.add()
    if node.op == "ReadVariableOp":
        # The shape belongs to the variable's handle, which is not there.
        added.op = "Placeholder"
        added.attr["dtype"].CopyFrom(node.attr["dtype"])
        added.attr["shape"].CopyFrom(node.attr["shape"])
        return added
    added.CopyFrom(node)
    if known is None or node.op != "Placeholder":
        return added
    if known.constants is not None:
        added.op = "Const"
        del added.attr["shape"]
        dtype = tf.as_dtype(node.attr["dtype"].type)
        added.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(known.constants[i], dtype))
    else:
        added.attr["shape"].shape.CopyFrom(known.shapes[i].as_proto())
    return added
