"""Which calls of a Keras model become blocks: what is compiled, and what is rematerialised.

`compile(jit_compile=True)` asks for XLA, which compiles a function for one device. A step is the
work of all devices, and its collectives stay outside: the largest layers that do not communicate
are compiled, each forward and backward. Without tensor parallelism that is the whole model.
"""

import functools
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.outlined_function import Block, NotABlock
from llmos_tf.layers import MoE
from llmos_tf.rematerialisation.rematerialise import rematerialised
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies.layer_stack.fsdp_prefetch import BlockGathers
from llmos_tf.strategies.layer_stack.rematerialise import NOTHING, recomputation_of

# On a model that was compiled with `jit_compile=True` under a mesh strategy.
_MARK = "_llmos_compiles_blocks"


def compiles_blocks(model: keras.Model) -> None:
    """Takes over `jit_compile` of a model that has just been compiled under a mesh strategy.

    Args:
        model: the model.
    """
    setattr(model, _MARK, model.jit_compile)
    # Or Keras would have XLA compile the step of all devices.
    model.jit_compile = False


def works_by_blocks(model: keras.Model) -> bool:
    """Returns whether layers of a model are compiled by XLA, or computed again by Keras's remat.

    Args:
        model: the model.

    Returns:
        True for `compile(jit_compile=True)`, for layers made under a `keras.RematScope`, and for
        mixtures of experts, each rank of which computes those of its own tokens.
    """
    if getattr(model, _MARK, False):
        return True
    return any(
        getattr(layer, "_remat_mode", None) or isinstance(layer, MoE)
        for layer in model._flatten_layers()
    )


def compiled_call(original: Any) -> Any:
    """Returns what stands in for `keras.layers.Layer.__call__` while a program is traced.

    Args:
        original: Keras's own.

    Returns:
        A function of the layer and its arguments.
    """

    @functools.wraps(original)
    def call(layer, *args, **kwargs):
        trace = current_program().trace
        if trace is None:
            return block_call(layer, *args, **kwargs)
        with trace.call_of(layer):
            return block_call(layer, *args, **kwargs)

    def block_call(layer, *args, **kwargs):
        program = current_program()
        if isinstance(layer, keras.layers.Embedding) and not program.looks_up:
            with program.having(looks_up=True):
                return call(layer, *args, **kwargs)
        if program.recomputation is None and _has_tensors(args, kwargs):
            with program.having(
                recomputation=recomputation_of(program, original, layer, args, kwargs),
                block_gathers=BlockGathers.of_model(program, layer),
            ):
                return block_call(layer, *args, **kwargs)
        if program.block_gathers is not None and program.block_gathers.takes(layer):
            return program.block_gathers.call(block_call, layer, args, kwargs)
        if getattr(layer, _MARK, False) and not program.compiles_blocks:
            return _compiling_model(call, layer, args, kwargs)
        again = program.recomputation or NOTHING
        if again.takes(layer, args, kwargs):
            function = MethodType(original, layer)
            compiling = _compiling if program.compiles_blocks else _as_it_is
            return again.call(program, function, compiling, args, kwargs)
        in_compiled = program.block is not None and program.block.compiled
        # A pipeline is cut between the layers of a model; and where it is differentiated, a
        # compiled lookup would have a dense gradient.
        whole = (keras.Model, keras.layers.Embedding)
        is_cut = (program.trace is not None and isinstance(layer, whole)) or again.holds(layer)
        if not program.compiles_blocks or in_compiled or is_cut or not _has_tensors(args, kwargs):
            return original(layer, *args, **kwargs)
        return _compiled(MethodType(original, layer), args, kwargs)

    return call


def _compiling_model(call: Callable, model: keras.Model, args: tuple, kwargs: dict) -> Any:
    """Calls a model and says so where nothing of it could be compiled."""
    program = current_program()
    before = program.num_compiled_blocks
    with program.having(compiles_blocks=True):
        result = call(model, *args, **kwargs)
    if program.num_compiled_blocks == before and _has_tensors(args, kwargs):
        warnings.warn(
            f"jit_compile=True has no effect on the model {model.name!r}: each of its layers "
            "communicates, loops, or changes state in a way that XLA cannot compile here.",
            stacklevel=2,
        )
    return result


def _compiled(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Calls a function as a compiled block, or as it is where it cannot be one."""
    program = current_program()
    try:
        block = Block(program, function, args, kwargs, compiled=True)
    except NotABlock:
        return function(*args, **kwargs)
    program.num_compiled_blocks += 1
    return block.finish(block.call(block.inputs, block.captured))


@functools.cache
def hook_remat() -> None:
    """Has `keras.remat` and `keras.RematScope` work in programs of a mesh strategy, from now on.

    TensorFlow's own `tf.recompute_grad`, which they call, refuses keyword arguments in a graph, and
    cannot know the parts of a variable that is cut over the mesh.
    """
    original = _internal.keras_core.remat

    @functools.wraps(original)
    def remat(f):
        @functools.wraps(f)
        def call(*args, **kwargs):
            if isinstance(getattr(f, "__self__", None), keras.layers.Embedding):
                # A lookup keeps nothing; and TensorFlow's own would give it a dense gradient, by
                # which Keras's adaptive optimizers update otherwise than by a sparse one.
                return f(*args, **kwargs)
            program = current_program()
            if program is not None and program.trace is not None and program.trace.is_outermost:
                # A pipeline is cut between the layers of a model, which are rematerialised each.
                return f(*args, **kwargs)
            if program is not None and not program.compiles_blocks:
                return rematerialised(f)(*args, **kwargs)
            if program is not None:
                # Compiled inside, so that XLA does not see that it runs twice.
                return rematerialised(_compiling(f))(*args, **kwargs)
            if kwargs and tf.inside_function():
                # As where Keras finds out a model's shapes; there TensorFlow's own would fail.
                return f(*args, **kwargs)
            return original(f)(*args, **kwargs)

        return call

    _internal.keras_core.remat = remat


def _compiling(function: Callable) -> Callable:
    """The function, with the same owner, compiled where it can be."""
    inner = getattr(function, "__func__", function)
    owner = getattr(function, "__self__", None)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return _compiled(function, args[1:] if inner is not function else args, kwargs)

    return call if owner is None else MethodType(call, owner)


def _as_it_is(function: Callable) -> Callable:
    return function


def _has_tensors(args: tuple, kwargs: dict) -> bool:
    """Whether a call computes; Keras also calls layers with shapes only."""
    leaves = keras.tree.flatten((args, kwargs))
    symbolic = any(isinstance(leaf, keras.KerasTensor) for leaf in leaves)
    return not symbolic and any(isinstance(leaf, tf.Tensor) for leaf in leaves)
