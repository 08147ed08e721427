"""Rematerialisation: activations are computed again in the backward pass instead of being kept.

Training deep nets with sublinear memory cost, arXiv 1604.06174; selectively, arXiv 2205.05198.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.outlined_function import Block, NotABlock
from llmos_tf.rematerialisation.joint_graph import call_keeping_products
from llmos_tf.spmd.program import current_program


def rematerialised(function: Callable, keep: str = "inputs") -> Callable:
    """Has the backward pass compute a function again, so that little more than its inputs is kept.

    The second time it draws the same random numbers, sees the same values of variables, gathers
    what is cut over the mesh again, and changes no state.

    Args:
        function: of tensors in any structure, such as a layer's `call`.
        keep: "inputs" keeps those only. "products" also keeps the results of matrix products and
            convolutions with weights, and of other products, such as of attention's weights and
            values, that are no larger than what they are made of: attention scores, softmax,
            dropout, norms and activations are computed again.

    Returns:
        The function, with that gradient inside the program of a mesh strategy. Elsewhere, as where
        Keras finds out shapes, it is called as it is.

    Raises:
        ValueError: another `keep`.

    Example:
        >>> class Block(keras.layers.Layer):
        ...     def call(self, x):
        ...         return x + rematerialised(self.feed_forward)(x)
    """

    if keep not in _CALLS:
        raise ValueError(f"keep is one of {', '.join(_CALLS)}. Received: {keep!r}.")

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
        return block.finish(_CALLS[keep](block))

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


_CALLS = {"inputs": _call_twice, "products": call_keeping_products}


def _name_of(function: Callable) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(owner, "name", None) or getattr(function, "__qualname__", repr(function))
    return str(name)
