"""Rematerialisation: activations are computed again in the backward pass instead of being kept.

Training deep nets with sublinear memory cost, arXiv 1604.06174.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.blocks import Block, NotABlock
from llmos_tf.program import current_program


def rematerialised(function: Callable) -> Callable:
    """Has the backward pass compute a function again, so that only its inputs are kept.

    The second time it draws the same random numbers, sees the same values of variables, gathers
    what is cut over the mesh again, and changes no state.

    Args:
        function: of tensors in any structure, such as a layer's `call`.

    Returns:
        The function, with that gradient inside the program of a mesh strategy. Elsewhere, as where
        Keras finds out shapes, it is called as it is.

    Example:
        >>> class Block(keras.layers.Layer):
        ...     def call(self, x):
        ...         return x + rematerialised(self.feed_forward)(x)
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        program = current_program()
        if program is None:
            return function(*args, **kwargs)
        if program.block is not None and program.block.compiled:
            raise NotABlock("a part of it is rematerialised")
        try:
            block = Block(program, function, args, kwargs)
        except NotABlock as reason:
            warnings.warn(
                f"{_name_of(function)} is not rematerialised, because {reason}. Its activations "
                "are kept; what it computes is the same.",
                stacklevel=2,
            )
            return function(*args, **kwargs)
        return block.finish(_call_twice(block))

    return call


def _call_twice(block: Block) -> list[tf.Tensor]:
    """Calls a block now, and again when its gradient is asked for."""
    inputs, captured = block.inputs, block.captured
    values = [*inputs, *captured]
    places = [i for i, v in enumerate(values) if v.dtype.is_floating or v.dtype.is_complex]
    if not places:
        return block.call(inputs, captured)

    def run(differentiable, recomputed):
        full = list(values)
        for place, value in zip(places, differentiable, strict=True):
            full[place] = value
        return block.call(full[: len(inputs)], full[len(inputs) :], recomputed)

    @tf.custom_gradient
    def twice(*differentiable):
        with _internal.stop_recording():
            outputs = run(differentiable, 0)

        def gradient(*upstream):
            known = [dy for dy in upstream if dy is not None]
            # Not before the gradient is here, or all activations would be there at once again.
            with tf.control_dependencies(known), tf.GradientTape() as tape:
                # One tensor may be several arguments; each has a gradient of its own.
                apart = [tf.identity(value) for value in differentiable]
                tape.watch(apart)
                again = run(apart, 1)
            asked = [y for y, dy in zip(again, upstream, strict=True) if dy is not None]
            return tape.gradient(asked, apart, output_gradients=known)

        return outputs, gradient

    return list(twice(*[values[place] for place in places]))


def _name_of(function: Callable) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(owner, "name", None) or getattr(function, "__qualname__", repr(function))
    return str(name)
