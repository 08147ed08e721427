"""Rotary position embedding (RoFormer, arXiv 2104.09864)."""

import tensorflow as tf


def rotate(x_BTNH: tf.Tensor, positions_T: tf.Tensor, theta: float = 10000.0) -> tf.Tensor:
    """Rotates pairs of features by an angle that grows with the position.

    Feature i is paired with feature i + H/2, as in Llama's published code for inference with
    Hugging Face weights; pair i turns by position · theta^(-2i/H).

    Args:
        x_BTNH: queries or keys, H even.
        positions_T: int32 positions of the T entries.
        theta: base of the wavelengths.

    Returns:
        Tensor like `x_BTNH`.
    """
    half = x_BTNH.shape[-1] // 2
    # Angles in float32 at least: a bfloat16 position beyond 256 is off by more than 1.
    wide = tf.float64 if x_BTNH.dtype == tf.float64 else tf.float32
    exponents = tf.range(half, dtype=wide) / half
    frequency_H = tf.pow(tf.constant(theta, wide), -exponents)
    angle_TH = tf.cast(positions_T, wide)[:, tf.newaxis] * frequency_H
    cos = tf.cast(tf.cos(angle_TH), x_BTNH.dtype)[:, tf.newaxis, :]
    sin = tf.cast(tf.sin(angle_TH), x_BTNH.dtype)[:, tf.newaxis, :]
    first, second = x_BTNH[..., :half], x_BTNH[..., half:]
    return tf.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)
