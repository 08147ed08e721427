"""Normalization against its formula. Parallel: `test_parallel.py`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.layers import LayerNorm, RMSNorm

pytestmark = pytest.mark.fast


def test_root_mean_square_formula(float64):
    """Fails if a mean is subtracted, epsilon is outside of the root, or the scale is left out."""
    x = np.random.default_rng(0).normal(size=(2, 3, 5))
    scale = np.arange(1.0, 6.0)
    layer = RMSNorm(epsilon=0.1)
    layer.build(x.shape)
    layer.set_weights([scale])
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(layer(tf.constant(x)), expected, atol=1e-13)


def test_layer_norm_formula(float64):
    """Fails if the layer is not Keras's any more: the mean, the variance, or what is trained."""
    x = np.random.default_rng(0).normal(size=(2, 3, 5))
    layer = LayerNorm(epsilon=0.1)
    layer.build(x.shape)
    layer.set_weights([np.arange(1.0, 6.0), np.full(5, 2.0)])
    centered = x - x.mean(-1, keepdims=True)
    expected = centered / np.sqrt(x.var(-1, keepdims=True) + 0.1) * np.arange(1.0, 6.0) + 2
    np.testing.assert_allclose(layer(tf.constant(x)), expected, atol=1e-13)


def test_the_mean_is_taken_in_float32():
    """Fails if squares are averaged in float16, whose largest number is 65,504."""
    keras.config.set_dtype_policy("mixed_float16")
    layer = RMSNorm()
    layer.build((None, 64))
    y = layer(tf.fill([1, 64], tf.constant(1000.0, tf.float16)))
    assert y.dtype == tf.float16
    np.testing.assert_allclose(y, 1.0, atol=1e-3)
