"""When the weights of a model's blocks are gathered along `fsdp`, and when they are let go.

A model's blocks are found as rematerialisation finds them (`strategies.layer_stack.detection`). The
gathers of a block wait for the input of the block that is called before it. So they are under way
while that one computes, and no more than two blocks' weights are new at a time. Where blocks send
more than weights, as along `tensor`, gathers have to be made before that: at the entry of block k
those of block k + 1, by what block k - 1 has read.

With `reshard_after_forward` a block's weights are let go after its forward pass. When the gradient
of block k's output arrives, the weights of block k - 1 are gathered again, before what is sent of
block k's gradients: collectives run in the order in which they are made. Nothing else is computed
again but what is made of weights alone, such as casts. The ops of the backward pass are made by
TensorFlow and use the first weights; at the end of the trace they are given the second ones.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.outlined_function import attributes_of
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.layer_stack.detection import recomputed_blocks
from llmos_tf.strategies.layer_stack.regather import CallViews, made_again, views_in_calls


class BlockGathers:
    """The blocks of a model that is being called.

    Args:
        program: that is being traced.
        layers: the blocks.
        reshards: whether they let their weights go after the forward pass.
    """

    def __init__(self, program: ReplicaProgram, layers: list[keras.layers.Layer], reshards: bool):
        self._program = program
        self._layers = {id(layer): layer for layer in layers}
        self._reshards = reshards
        self._graph = tf.compat.v1.get_default_graph()
        # Whether a block sends more than weights, behind which the next one's gathers would wait.
        other = set(program.mesh.sizes) - {"data", "fsdp"}
        self._gathers_early = program.mesh.axis_size(other) > 1
        # In the order in which they are called.
        self._calls: list[_BlockCall] = []
        # What was gathered for the next call.
        self._early: _Early = {}

    @classmethod
    def of_model(cls, program: ReplicaProgram, model: keras.layers.Layer) -> "BlockGathers | None":
        """Returns those of a call that no other layer makes.

        Args:
            program: that is being traced.
            model: a model or layer.

        Returns:
            None where nothing is gathered, or no blocks are known.
        """
        # A pipeline is cut out of its trace, and has a schedule of its own.
        if program.mesh.axis_size("fsdp") == 1 or program.trace is not None or not model.built:
            return None
        layers = recomputed_blocks(model)
        reshards = program.strategy.extended.options.reshard_after_forward
        if reshards and isinstance(model, keras.Model) and _internal.could_possibly_record():
            _warn_of_no_effect(program, model, layers)
        return cls(program, layers, reshards and program.is_outermost()) if layers else None

    def takes(self, layer: keras.layers.Layer) -> bool:
        """Returns whether a call of a layer is that of a block.

        Args:
            layer: that is called.

        Returns:
            False also within a loop, or a function of which the model is not a part.
        """
        is_here = tf.compat.v1.get_default_graph() is self._graph
        return is_here and id(layer) in self._layers

    def call(self, function: Callable, layer: keras.layers.Layer, args: tuple, kwargs: dict) -> Any:
        """Calls a block.

        Args:
            function: of the block and its arguments.
            layer: the block.
            args: its arguments.
            kwargs: its keyword arguments.

        Returns:
            What it returns.
        """
        inputs = list(self._tensors((args, kwargs)))
        waits = self._calls[-1].inputs if self._calls else []
        call = _BlockCall(self._program, self._graph, layer, inputs, waits, self._early)
        place = len(self._calls)
        self._early = self._gathered_early(call) if self._gathers_early and place else {}
        self._calls.append(call)
        with self._program.having(block_gathers=None, gathering=call):
            result = function(layer, *args, **kwargs)
        if not self._reshards or not call.gathered:
            return result
        self._program.endings.append(call.use_again)
        return self._watched(result, place)

    def _gathered_early(self, call: "_BlockCall") -> "_Early":
        """Gathers for the next block what stands where the block before this one has read."""
        order, before = list(self._layers.values()), self._calls[-1]
        following = order[order.index(call.layer) + 1 :][:1]
        if not following or not _are_alike(before.layer, following[0]):
            return {}
        places = {id(_stored(v)): i for i, v in enumerate(before.layer.weights)}
        found: _Early = {}
        with self._program.having(gathering=None):
            for one in before.gathered:
                if one.is_lookup or id(one.variable) not in places:
                    continue
                variable = _stored(following[0].weights[places[id(one.variable)]])
                if getattr(variable, "layout", None) != one.variable.layout:
                    continue
                part = variable.part_to_gather(one.kind)
                value = variable.gathered_from(one.kind, _after(call.inputs, part))
                found[id(variable), one.kind] = one._replace(
                    value=value, part=part, variable=variable
                )
        return found

    def _watched(self, result: Any, place: int) -> Any:
        """What a block has returned, whose gradient is seen to arrive."""

        @tf.custom_gradient
        def watched(x):
            def gradient(dy):
                # In a loop's gradient another graph than that in which weights were gathered.
                if tf.compat.v1.get_default_graph() is self._graph:
                    for call in reversed(self._calls[max(0, place - 1) : place + 1]):
                        call.gather_again(dy)
                return dy

            return tf.identity(x), gradient

        here = {x.ref() for x in self._tensors(result)}

        def one(x):
            if not isinstance(x, tf.Tensor) or x.ref() not in here:
                return x
            y = watched(x)
            for name, value in attributes_of(x):
                setattr(y, name, value)
            return y

        return tf.nest.map_structure(one, result, expand_composites=True)

    def _tensors(self, structure: Any) -> Iterator[tf.Tensor]:
        """The differentiable tensors of the graph in which the model is called."""
        for x in tf.nest.flatten(structure, expand_composites=True):
            is_tensor = isinstance(x, tf.Tensor) and tf.is_symbolic_tensor(x)
            if is_tensor and x.graph is self._graph and (x.dtype.is_floating or x.dtype.is_complex):
                yield x


def _warn_of_no_effect(
    program: ReplicaProgram, model: keras.Model, layers: list[keras.layers.Layer]
) -> None:
    reason = None
    if not layers:
        reason = "no two of its layers are blocks of one kind that hold most of its weights"
    elif not program.is_outermost():
        reason = "it is called in a loop, a condition or a tf.function of its own"
    if reason is not None:
        warnings.warn(
            f"reshard_after_forward=True has no effect on {model.name!r}, because {reason}. Its "
            "gathered weights are kept for the backward pass; what it computes is the same.",
            stacklevel=2,
        )


class _Gathered(NamedTuple):
    """The value of a kind that was gathered of a variable's part; see `ShardedVariable`."""

    value: tf.Tensor
    part: tf.Tensor
    variable: ShardedVariable
    kind: str
    is_lookup: bool = False


# By a variable's `id` and the kind of its value.
_Early = dict[tuple[int, str], _Gathered]


def _are_alike(one: keras.layers.Layer, other: keras.layers.Layer) -> bool:
    """Whether a weight of one layer stands for that at the same place of another."""
    return type(one) is type(other) and len(one.weights) == len(other.weights)


def _after(tensors: list[tf.Tensor], part: tf.Tensor) -> tf.Tensor:
    """A part that is there no earlier than some tensors."""
    # It alone waits: of constants that wait TensorFlow does not know that they are constant.
    with tf.control_dependencies(tensors):
        return tf.identity(part)


def _stored(weight: keras.Variable) -> Any:
    return getattr(weight, "_value", weight)


class _BlockCall:
    """The gathers of one call of a block."""

    def __init__(
        self,
        program: ReplicaProgram,
        graph: tf.Graph,
        layer: keras.layers.Layer,
        inputs: list[tf.Tensor],
        waits: list[tf.Tensor],
        early: _Early,
    ):
        self.layer = layer
        self.inputs = inputs
        self.gathered: list[_Gathered] = []
        self._program = program
        self._graph = graph
        self._waits = waits
        self._early = early
        # What stands in the backward pass for a tensor of the forward pass.
        self._again: list[tuple[tf.Tensor, tf.Tensor]] = []
        self._inside: list[CallViews] = []

    def gather(self, variable: ShardedVariable, kind: str, part: tf.Tensor | None) -> tf.Tensor:
        """Gathers a weight that the block reads.

        Args:
            variable: the weight.
            kind: "slice" or "full".
            part: what the rank stores, where rows of it are looked up; else None.

        Returns:
            The value of that kind.
        """
        is_lookup = part is not None
        if self._program.block is not None:
            part = part if is_lookup else variable.part_to_gather(kind)
            return variable.gathered_from(kind, part)
        one = None if is_lookup else self._early.pop((id(variable), kind), None)
        if one is None:
            part = part if is_lookup else variable.part_to_gather(kind)
            is_here = tf.compat.v1.get_default_graph() is self._graph
            held = _after(self._waits, part) if is_here else part
            value = variable.gathered_from(kind, held)
            one = _Gathered(value, part, variable, kind, is_lookup)
        if one.value.graph is self._graph:
            self.gathered.append(one)
        return one.value

    def gather_again(self, dy: Any) -> None:
        """Gathers the block's weights for its backward pass, once.

        Args:
            dy: the gradient for which that waits.
        """
        if self._again:
            return
        with (
            _internal.stop_recording(),
            self._program.having(gathering=None, block=None),
        ):
            waits = [getattr(dy, "values", dy)]
            again = [
                one.variable.gathered_from(one.kind, _after(waits, one.part))
                for one in self.gathered
            ]
        values = [one.value for one in self.gathered]
        self._again = list(zip(values, again, strict=True))
        self._again += made_again(self._again)
        self._inside = views_in_calls(self._again)

    def use_again(self, places: dict[str, int]) -> None:
        """Gives the ops of the backward pass the weights that were gathered for it.

        Args:
            places: where each op of the program stands, by name.
        """
        returned = [pair for views in self._inside for pair in views.returned()]
        for before, now in self._again + returned:
            made = places[now.op.name]
            for op in before.consumers():
                if places[op.name] > made:
                    _internal.replace_input(op, before, now)
