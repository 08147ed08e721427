"""The functions of a transformer that go over memory once, each with its gradient."""

import math
from typing import Any

import tensorflow as tf

from llmos_tf.graph.fusion import fused

# --- GELU ----------------------------------------------------------------------------------------

# tanh(u) + 1 is 2 σ(2 u).
_A = 2 * math.sqrt(2 / math.pi)
_B = 0.044715 * _A


@tf.custom_gradient
def gelu(x: tf.Tensor) -> Any:
    """GELU by its tanh approximation (arXiv 1606.08415), as GPT-2 was trained.

    x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³))) = x σ(a x + b x³). Backward computes it again from
    x, which is all that is kept.

    Args:
        x: any shape.

    Returns:
        Tensor like `x`.
    """
    return _gelu(x), lambda upstream: _gelu_gradient(x, upstream)


@fused
def _gelu(x):
    return x * tf.sigmoid(x * (_A + _B * x * x))


@fused
def _gelu_gradient(x, upstream):
    square = x * x
    gate = tf.sigmoid(x * (_A + _B * square))
    return upstream * (gate + x * gate * (1.0 - gate) * (_A + 3 * _B * square))


# --- normalization -------------------------------------------------------------------------------


@tf.custom_gradient
def layer_norm(x: tf.Tensor, scale: tf.Tensor, shift: tf.Tensor, epsilon: tf.Tensor) -> Any:
    """(x - mean) / sqrt(variance + ε) · g + b over the last dimension (arXiv 1607.06450).

    In float32 at least. Backward computes it again from x, which is all that is kept.

    Args:
        x: ``[..., D]``.
        scale: g, ``[D]``.
        shift: b, ``[D]``.
        epsilon: ε, scalar of the dtype that is computed in.

    Returns:
        Tensor like `x`.
    """

    def gradient(upstream):
        return (*_layer_norm_gradient(x, scale, shift, epsilon, upstream), None)

    return _layer_norm(x, scale, shift, epsilon), gradient


@fused
def _layer_norm(x, scale, shift, epsilon):
    normal, _ = _normalized(x, epsilon)
    y = normal * tf.cast(scale, normal.dtype) + tf.cast(shift, normal.dtype)
    return tf.cast(y, x.dtype)


@fused
def _layer_norm_gradient(x, scale, shift, epsilon, upstream):
    normal, inverse = _normalized(x, epsilon)
    wide = tf.cast(upstream, normal.dtype)
    dn = wide * tf.cast(scale, normal.dtype)
    inner = dn - _mean(dn) - normal * _mean(dn * normal)
    rows = list(range(x.shape.rank - 1))
    dscale, dshift = tf.reduce_sum(wide * normal, rows), tf.reduce_sum(wide, rows)
    return tf.cast(inverse * inner, x.dtype), _as(dscale, scale), _as(dshift, shift)


@tf.custom_gradient
def rms_norm(x: tf.Tensor, scale: tf.Tensor, epsilon: tf.Tensor) -> Any:
    """x / sqrt(mean(x²) + ε) · g over the last dimension (arXiv 1910.07467).

    In float32 at least. Backward computes it again from x, which is all that is kept.

    Args:
        x: ``[..., D]``.
        scale: g, ``[D]``.
        epsilon: ε, scalar of the dtype that is computed in.

    Returns:
        Tensor like `x`.
    """

    def gradient(upstream):
        return (*_rms_norm_gradient(x, scale, epsilon, upstream), None)

    return _rms_norm(x, scale, epsilon), gradient


@fused
def _rms_norm(x, scale, epsilon):
    wide = tf.cast(x, epsilon.dtype)
    return tf.cast(wide * tf.math.rsqrt(_mean(wide * wide) + epsilon), x.dtype) * scale


@fused
def _rms_norm_gradient(x, scale, epsilon, upstream):
    wide = tf.cast(x, epsilon.dtype)
    inverse = tf.math.rsqrt(_mean(wide * wide) + epsilon)
    normal = wide * inverse
    dy = tf.cast(upstream, normal.dtype)
    dn = dy * tf.cast(scale, normal.dtype)
    dx = inverse * (dn - normal * _mean(dn * normal))
    dscale = tf.reduce_sum(dy * normal, list(range(x.shape.rank - 1)))
    return tf.cast(dx, x.dtype), _as(dscale, scale)


def _normalized(x, epsilon):
    """x - mean over its deviation, and 1 over that."""
    wide = tf.cast(x, epsilon.dtype)
    centered = wide - _mean(wide)
    inverse = tf.math.rsqrt(_mean(centered * centered) + epsilon)
    return centered * inverse, inverse


def _mean(x):
    return tf.reduce_mean(x, axis=-1, keepdims=True)


def _as(gradient, weight):
    return tf.cast(gradient, weight.dtype)
