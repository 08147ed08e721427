"""Blocks: stretches of a program that are functions of their own.

A block is traced once into a function that is pure: of its inputs and of the values that it reads
from variables, which are read outside of it, and to its outputs and the new values of the state
that it writes, which are stored outside of it. So it can be compiled by XLA, which knows no
collectives (`compiled`), or run a second time in the backward pass with the dropout masks of the
first and without counting anything twice (`llmos_tf.memory.rematerialised`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.errors import trace_for_devices
from llmos_tf.graph.subgraph import GraphCuts
from llmos_tf.spmd.program import ReplicaProgram

# Tensors that Keras keeps as attributes of another one.
_ATTRIBUTES = ("_keras_mask", "_keras_logits")
# What an output of a layer may hold beside tensors.
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class NotABlock(BaseException):
    """What a function does cannot be done in a block.

    No `Exception`: Keras and users' layers catch those and raise others.
    """


class Block:
    """A function traced as a block.

    `NotABlock` is raised where it communicates and is to be compiled, changes state inside of a
    loop, or returns what a block cannot.

    Args:
        program: the program it belongs to.
        function: of tensors in any structure; what it reads of variables it reads anew here.
        args: its arguments. Only their tensors are inputs.
        kwargs: its keyword arguments.
        compiled: whether XLA compiles it; then it must not communicate.
    """

    def __init__(
        self,
        program: ReplicaProgram,
        function: Callable,
        args: tuple,
        kwargs: dict,
        compiled: bool = False,
    ):
        self.compiled = compiled
        # 1 in the call that recomputes, 0 else; an input.
        self.recomputed: tf.Tensor | None = None
        self.outer = program.block
        self._program = program
        self._function = function
        self._inputs = _Tensors((args, kwargs))
        self._graph: tf.Graph | None = None
        self._outer_graph = tf.compat.v1.get_default_graph()
        self._lifted: dict[Any, tf.Tensor] = {}
        self._written: dict[int, tuple[Any, tf.Tensor]] = {}
        self._owner = getattr(function, "__self__", None)
        self._concrete = self._trace()

    @property
    def inputs(self) -> list[tf.Tensor]:
        """The input tensors."""
        return self._inputs.tensors

    @property
    def captured(self) -> list[tf.Tensor]:
        """What the function takes beside its inputs: values of variables and of the program."""
        return list(self._concrete.captured_inputs)

    @property
    def graph(self) -> tf.Graph:
        """The graph in which it was traced."""
        return self._graph

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Entered while ops are added to its graph after it was traced, as its backward pass."""
        with self._graph.as_default(), self._program.having(block=self):
            yield

    @property
    def levels(self) -> int:
        """How many blocks around this one, and itself, may be run a second time."""
        return (0 if self.outer is None else self.outer.levels) + (0 if self.compiled else 1)

    def key_offset(self) -> tf.Tensor:
        """What tells the collectives of a recomputation from those of the first pass.

        Returns:
            int32 scalar below ``2 ** levels``.
        """
        outer = 0 if self.outer is None else self.outer.key_offset()
        return outer if self.compiled else 2 * outer + self.recomputed

    # --- what the function does while it is traced ------------------------------------------------

    def lifts(self, layout: Any) -> bool:
        """Returns whether a variable is gathered outside of the block: XLA knows no collectives.

        Args:
            layout: how it lies on the mesh.

        Returns:
            Whether what is gathered is an input of the block.
        """
        return self.compiled and not layout.is_whole

    def read(self, kind: str, variable: Any, read: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Returns a value that is read outside, once for the block.

        Args:
            kind: which value of the variable: "part", "slice" or "full".
            variable: a variable of the mesh.
            read: reads it, in the program around the block.

        Returns:
            The value, an input of the block.
        """
        key = (kind, id(variable))
        if key not in self._lifted:
            spare = self._program.spare_reads.pop((id(self._outer_graph), key), None)
            if spare is None:
                with self._outside():
                    spare = read()
            self._lifted[key] = spare
        return self._lifted[key]

    def written(self, variable: Any) -> tf.Tensor | None:
        """Returns what the block, or one around it, has written into a variable, or None.

        Args:
            variable: a variable of the mesh.

        Returns:
            Its new value.
        """
        if id(variable) in self._written:
            return self._written[id(variable)][1]
        return None if self.outer is None else self.outer.written(variable)

    def write(self, variable: Any, value: tf.Tensor) -> None:
        """Notes the new value of a variable, which is stored after the block.

        Args:
            variable: a variable of the mesh.
            value: its whole new value.

        Raises:
            NotABlock: in a loop or a condition, from which no value comes out.
        """
        if tf.compat.v1.get_default_graph() is not self._graph:
            raise NotABlock(f"it assigns the variable {variable.name} in a loop or a condition")
        self._written[id(variable)] = (variable, value)

    @contextmanager
    def _outside(self) -> Iterator[None]:
        with self._outer_graph.as_default(), self._program.having(block=self.outer):
            yield

    # --- tracing and calling ----------------------------------------------------------------------

    def _trace(self) -> Any:
        self._losses_before = {x: len(losses) for x, losses in self._added_losses().items()}

        def body(recomputed, *tensors):
            self._graph = tf.compat.v1.get_default_graph()
            self.recomputed = recomputed
            args, kwargs = self._inputs.rebuilt(tensors)
            with self._program.having(block=self):
                result = self._function(*args, **kwargs)
            if self.compiled and _has_loop(self._graph):
                raise NotABlock("XLA cannot hand what a loop keeps to the backward pass")
            self._outputs = _Tensors(result)
            self._outputs.check()
            self._losses = [
                (layer, i, loss)
                for layer, losses in self._added_losses().items()
                for i, loss in enumerate(losses)
                if getattr(loss, "graph", None) is self._graph
            ]
            state = [value for _, value in self._written.values()]
            return [*self._outputs.tensors, *(loss for *_, loss in self._losses), *state]

        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in self.inputs]
        specs = [tf.TensorSpec([], tf.int32), *specs]
        try:
            if self.compiled:
                traced = tf.function(body, autograph=False, jit_compile=True)
                concrete = traced.get_concrete_function(*specs)
            else:
                # Not inlined: the graph optimizer would find the same ops twice and keep the
                # results.
                concrete = trace_for_devices(body, specs, _noinline=True)
            _internal.keep_gradients_with(concrete.graph)
            return concrete
        except NotABlock:
            # What was read outside, by collectives maybe, serves the blocks inside this one.
            graph = id(self._outer_graph)
            self._program.spare_reads.update({(graph, k): v for k, v in self._lifted.items()})
            self.forget()
            raise

    def forget(self) -> None:
        """Takes back what the function has added to the loss, where the block is not to be used."""
        for layer, losses in self._added_losses().items():
            del losses[self._losses_before.get(layer, 0) :]

    def call(
        self, inputs: list[tf.Tensor], captured: list[tf.Tensor], recomputed: int = 0
    ) -> list[tf.Tensor]:
        """Calls the traced function.

        Args:
            inputs: like `inputs`.
            captured: like `captured`.
            recomputed: 1 in a second call.

        Returns:
            Flat outputs, for `finish`.
        """
        flag = tf.constant(recomputed, tf.int32)
        return _internal.call_with_captures(self._concrete, [flag, *inputs], captured)

    def finish(self, outputs: list[tf.Tensor]) -> Any:
        """Stores the state that the function has written.

        Args:
            outputs: of the first call.

        Returns:
            What the function has returned.
        """
        count = len(self._outputs.tensors)
        result = self._outputs.rebuilt(outputs[:count])
        losses = outputs[count : count + len(self._losses)]
        for (layer, i, _), loss in zip(self._losses, losses, strict=True):
            layer._losses[i] = loss
        state = outputs[count + len(self._losses) :]
        if self._program.trace is not None:
            state = self._apart(state)
        for (variable, _), value in zip(self._written.values(), state, strict=True):
            variable.store(self._program, value)
        return result

    def _apart(self, state: list[tf.Tensor]) -> list[tf.Tensor]:
        """New values of state, where they follow from what is captured by functions of their own.

        Every stage of a pipeline advances all streams of random numbers, and has the inputs of its
        own blocks only.
        """
        if not self._written:
            return state
        cuts = GraphCuts(self._graph)
        known = {inner.ref(): outer for outer, inner in self._graph.captures}
        apart = []
        for (_, value), result in zip(self._written.values(), state, strict=True):
            cut = cuts.cut(cuts.ancestors([value]), [value])
            needed = [*cut.feeds, *([value] if value.op.type == "Placeholder" else [])]
            follows = all(x.ref() in known for x in needed)
            apart += cut(known) if follows else [result]
        return apart

    def _added_losses(self) -> dict[Any, list]:
        """The terms that each layer of the function has added to the loss."""
        if not isinstance(self._owner, keras.layers.Layer):
            return {}
        return {layer: layer._losses for layer in self._owner._flatten_layers()}


class _Tensors:
    """The tensors in a nested structure, and those that Keras keeps as their attributes."""

    def __init__(self, structure: Any):
        self._structure = structure
        self._flat = tf.nest.flatten(structure, expand_composites=True)
        plain = [x for x in self._flat if isinstance(x, tf.Tensor)]
        self._attributes = [
            (i, name, value)
            for i, tensor in enumerate(plain)
            for name, value in attributes_of(tensor)
        ]
        self.tensors = [*plain, *(value for *_, value in self._attributes)]
        self._count = len(plain)

    def check(self) -> None:
        """Checks that nothing but the tensors comes from the block's graph."""
        for value in self._flat:
            if not isinstance(value, (tf.Tensor, *_PLAIN)):
                raise NotABlock(f"it returns a {type(value).__name__}")

    def rebuilt(self, tensors: list[tf.Tensor] | tuple[tf.Tensor, ...]) -> Any:
        """The structure with other tensors in their places."""
        plain = iter(tensors[: self._count])
        flat = [next(plain) if isinstance(x, tf.Tensor) else x for x in self._flat]
        for (i, name, _), value in zip(self._attributes, tensors[self._count :], strict=True):
            setattr(tensors[i], name, value)
        return tf.nest.pack_sequence_as(self._structure, flat, expand_composites=True)


def _has_loop(graph: tf.Graph) -> bool:
    """Whether there is a loop in a graph, or in a function that it calls."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return any(node.op in ("While", "StatelessWhile") for node in nodes)


def attributes_of(tensor: tf.Tensor) -> Iterator[tuple[str, tf.Tensor]]:
    """Yields what Keras keeps with a tensor for losses and metrics: masks and logits.

    Args:
        tensor: an output of a layer.

    Yields:
        Names of attributes and their values.
    """
    for name in _ATTRIBUTES:
        value = getattr(tensor, name, None)
        if isinstance(value, tf.Tensor):
            yield name, value
        elif name == "_keras_logits" and _op_type(tensor) in ("Softmax", "Sigmoid"):
            # Keras's losses look behind TensorFlow's own ops, which a block hides.
            yield name, tensor.op.inputs[0]


def _op_type(tensor: tf.Tensor) -> str:
    return tensor.op.type if tf.is_symbolic_tensor(tensor) else ""
