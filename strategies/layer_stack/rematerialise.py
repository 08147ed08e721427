"""Which layers of a model are computed again in the backward pass: the option `rematerialise`.

Layers are found by what the model is made of, when it is called and a gradient is to be taken:

- "full": every layer that a model, a model in it, or a stack of blocks calls itself;
- "block": the blocks of all stacks, which hold nearly all there is to keep; of a model without one,
  the layers as for "full";
- "selective": the same blocks, of which the results of products are kept;
- a number of bytes: of these blocks each is kept, kept in part or computed again, such that what
  all of them keep fits and the least is computed. It is counted in a trace of the model.

A layer whose inputs are integers, as a lookup, keeps nothing and is called as it is.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives.traffic_report import noted_batch
from llmos_tf.graph.outlined_function import Block, NotABlock
from llmos_tf.rematerialisation.budget import Way, cheapest_within, least_bytes
from llmos_tf.rematerialisation.joint_graph import JointBlock
from llmos_tf.rematerialisation.rematerialise import rematerialised
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.layer_stack.detection import is_stack, recomputed_blocks

# What the options keep of a layer, as `rematerialised` calls it.
_KEEPS = {"full": "inputs", "block": "inputs", "selective": "products"}
# The ways to run a block, in the order in which they keep less and cost more.
_WAYS = (None, "products", "inputs")


class Recomputation:
    """How the layers of a model that is being called are run.

    Args:
        layers: those that may be computed again.
        keep: what is kept of the next of them that is called: "inputs", "products" or None for all.
        model: in which they are.
    """

    def __init__(
        self,
        layers: Iterable[keras.layers.Layer],
        keep: Callable[[], str | None],
        model: keras.layers.Layer | None = None,
    ):
        self._layers = {id(layer): layer for layer in layers}
        self._keep = keep
        self._model = model

    @functools.cached_property
    def _holders(self) -> set[int]:
        """The layers that have one of these inside."""
        holders: set[int] = set()

        def visit(layer):
            inside = [visit(part) or id(part) in self._layers for part in layer._layers]
            if any(inside):
                holders.add(id(layer))
            return any(inside)

        if self._model is not None:
            visit(self._model)
        return holders

    @classmethod
    def of_model(cls, model: keras.layers.Layer, option: str) -> "Recomputation":
        """Returns that of a model, for an option that is no number.

        Args:
            model: that is called.
            option: "none", "full", "block" or "selective".

        Returns:
            Which layers are computed again.
        """
        layers = [] if option == "none" else _layers_of(model, option)
        return cls(layers, lambda: _KEEPS[option], model)

    def holds(self, layer: keras.layers.Layer) -> bool:
        """Returns whether a layer calls some that are computed again.

        Args:
            layer: that is called.

        Returns:
            Then XLA is not to compile it as a whole.
        """
        return bool(self._layers) and id(layer) in self._holders

    def takes(self, layer: keras.layers.Layer, args: tuple, kwargs: dict) -> bool:
        """Returns whether a call of a layer is one of those.

        Args:
            layer: that is called.
            args: its arguments.
            kwargs: its keyword arguments.

        Returns:
            False also for what is called with integers only.
        """
        if id(layer) not in self._layers or isinstance(layer, keras.layers.Embedding):
            return False
        return any(x.dtype.is_floating or x.dtype.is_complex for x in _tensors((args, kwargs)))

    def call(
        self,
        program: ReplicaProgram,
        function: Callable,
        compiling: Callable[[Callable], Callable],
        args: tuple,
        kwargs: dict,
    ) -> Any:
        """Calls such a layer.

        Args:
            program: that is being traced.
            function: Keras's `__call__` of the layer.
            compiling: has XLA compile a function, where the program compiles.
            args: its arguments.
            kwargs: its keyword arguments.

        Returns:
            What it returns.
        """
        keep = self._keep()
        with program.having(recomputation=NOTHING):
            if keep is None:
                return compiling(function)(*args, **kwargs)
            if keep == "inputs":
                # Compiled inside, so that XLA does not see that it runs twice.
                return rematerialised(compiling(function))(*args, **kwargs)
            # XLA would make one op of what is kept and what is not.
            with program.having(compiles_blocks=False):
                return rematerialised(function, keep)(*args, **kwargs)


NOTHING = Recomputation([], lambda: None)


def recomputation_of(
    program: ReplicaProgram, original: Callable, model: Any, args: tuple, kwargs: dict
) -> Recomputation:
    """Returns how the layers of a model are run in a call that no other layer makes.

    Args:
        program: that is being traced.
        original: Keras's `Layer.__call__`.
        model: a model or layer.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        Nothing to be computed again where no gradient can be asked for.

    Raises:
        ValueError: a budget of bytes that is too small, or of which it cannot be told what fits.
    """  # noqa: DOC502
    options = program.strategy.extended.options
    option = options.rematerialise
    is_differentiated = program.trace is not None or _internal.could_possibly_record()
    if option == "none" or not is_differentiated:
        if options.reshard_after_forward and is_differentiated and model.built:
            # XLA compiles them one by one, as each lets go of its weights by itself.
            return Recomputation(recomputed_blocks(model), lambda: None, model)
        return NOTHING
    if not model.built:
        warnings.warn(
            f"Nothing of {model.name!r} is rematerialised in this trace, because it is not built: "
            "its layers are not known. Give its input shape, or call it on a batch first.",
            stacklevel=2,
        )
        return NOTHING
    if isinstance(option, str):
        return Recomputation.of_model(model, option)
    return _within_bytes(program, original, model, args, kwargs, option)


def _within_bytes(
    program: ReplicaProgram,
    original: Callable,
    model: Any,
    args: tuple,
    kwargs: dict,
    budget: int,
) -> Recomputation:
    counting = _Counting(_layers_of(model, "block"))
    args, kwargs = _with_rows(program, model, args, kwargs)
    own = program.having(
        recomputation=counting, statistics=dict(program.statistics), compiles_blocks=False
    )
    try:
        with own:
            Block(program, MethodType(original, model), args, kwargs).forget()
    except NotABlock as reason:
        raise ValueError(
            f"rematerialise={budget}: what the layers of {model.name!r} keep cannot be counted, "
            f"because {reason}. Take 'block' or 'selective'."
        ) from None
    least = least_bytes(counting.ways)
    if least > budget:
        raise ValueError(
            f"rematerialise={budget} is a number of bytes, and the {len(counting.ways)} blocks of "
            f"{model.name!r} keep {least} bytes on a device at least, however much is computed "
            f"again. Give {least} or more, a smaller batch, or a mesh that splits more."
        )
    chosen = iter(cheapest_within(counting.ways, budget))
    return Recomputation(counting.layers, lambda: _WAYS[next(chosen)], model)


class _Counting(Recomputation):
    """Counts the ways to run each block while a model is traced."""

    def __init__(self, layers: list[keras.layers.Layer]):
        super().__init__(layers, lambda: None)
        self.layers = layers
        self.ways: list[list[Way]] = []

    def call(self, program, function, compiling, args, kwargs):
        del compiling
        with program.having(recomputation=NOTHING):
            block = Block(program, function, args, kwargs)
            joint = JointBlock(block)
            self.ways.append(
                [
                    Way(joint.bytes_kept(), 0.0),
                    Way(joint.bytes_kept_of_products(), joint.cost_beside_products()),
                    Way(joint.input_bytes(), joint.cost()),
                ]
            )
            return block.finish(block.call(block.inputs, block.captured))


def _layers_of(model: keras.layers.Layer, option: str) -> list[keras.layers.Layer]:
    blocks = [] if option == "full" else recomputed_blocks(model)
    return blocks or list(_called_layers(model))


def _called_layers(model: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """The layers of a model, and of the models and stacks in it."""
    for layer in model._layers:
        if isinstance(layer, keras.Model) or is_stack(layer):
            yield from _called_layers(layer)
        else:
            yield layer


def _with_rows(program: ReplicaProgram, model: Any, args: tuple, kwargs: dict) -> tuple:
    """The arguments with as many rows as a rank has of a whole batch."""
    specs = [x for x in tf.nest.flatten(noted_batch(model)) if isinstance(x, tf.TensorSpec)]
    rows = specs[0].shape[0] if specs and specs[0].shape.rank else None
    own = None if rows is None else -(-rows // program.mesh.batch_ways)

    def known(x):
        if not isinstance(x, tf.Tensor) or x.shape.is_fully_defined():
            return x
        shape = [own, *x.shape[1:]] if x.shape.rank else [None]
        if None in shape:
            raise ValueError(
                "To count what the blocks of a model keep for the backward pass, and choose what "
                f"fits, the size of its input has to be known. Received: shape {x.shape}. Use "
                "dataset.batch(..., drop_remainder=True), or 'block' or 'selective' in place of "
                "a number of bytes."
            )
        return tf.ensure_shape(x, shape)

    return tf.nest.map_structure(known, (args, kwargs))


def _tensors(structure: Any) -> list[tf.Tensor]:
    return [x for x in tf.nest.flatten(structure) if isinstance(x, tf.Tensor)]
