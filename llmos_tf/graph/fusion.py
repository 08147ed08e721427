"""Functions that go over memory once, where TensorFlow's ops would each go over it again.

Between two matrix products a transformer computes little on large tensors: what takes time there is
to read and to write them. XLA makes one loop of such a function. Only what is large is compiled,
because that takes some 60 ms for each function, shape and device; the rest is computed op by op, by
the same formula.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import tensorflow as tf

# Elements of the first argument, its unknown dimensions counted as 1, from which on XLA compiles.
MIN_ELEMENTS = 2**15

# What TensorFlow brings for macOS has no XLA for its processors.
_CAN_COMPILE = sys.platform != "darwin"


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a pure function of tensors that should be one loop.

    It is called with tensors only: a number that is the same in all calls is captured. There is a
    gradient, but none that is fused; give the function one by `tf.custom_gradient`.

    Args:
        function: of tensors to tensors, without state, randomness or collectives.

    Returns:
        The function, compiled by XLA where its first argument is large.

    Example:
        >>> @fused
        ... def squared_relu(x):
        ...     return tf.square(tf.nn.relu(x))
    """
    compiled = tf.function(function, autograph=False, jit_compile=True)

    @functools.wraps(function)
    def call(*tensors):
        return (compiled if is_large(tensors[0]) else function)(*tensors)

    return call


def is_large(x: tf.Tensor) -> bool:
    """Returns whether it is worth it to compile what goes over a tensor.

    Args:
        x: the tensor.

    Returns:
        False also where XLA is not at hand.
    """
    if not _CAN_COMPILE or x.shape.rank is None:
        return False
    return math.prod(length or 1 for length in x.shape) >= MIN_ELEMENTS
