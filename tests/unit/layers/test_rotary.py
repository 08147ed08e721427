"""Rotary positions against their formula."""

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.layers import rotate

pytestmark = pytest.mark.fast


def test_pairs_turn_by_the_formula():
    """Fails for other pairs than (i, i + H/2), a wrong wavelength or direction, or positions that
    do not begin where they are said to. Float64: a sine of 70 radians is good to 1e-14."""
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions, theta = np.arange(5) + 65, 100.0
    expected = np.empty_like(x)
    for i in range(4):
        angle = (positions * theta ** (-2 * i / 8))[:, np.newaxis]
        first, second = x[..., i], x[..., i + 4]
        expected[..., i] = first * np.cos(angle) - second * np.sin(angle)
        expected[..., i + 4] = second * np.cos(angle) + first * np.sin(angle)
    actual = rotate(tf.constant(x), tf.constant(positions, tf.int32), theta)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_products_depend_on_distances_only():
    """Fails if query and key are turned in different ways."""
    rng = np.random.default_rng(1)
    q, k = (tf.constant(rng.normal(size=(1, 1, 1, 8))) for _ in range(2))
    products = [
        tf.reduce_sum(rotate(q, tf.constant([at + 3])) * rotate(k, tf.constant([at])))
        for at in (0, 1, 90)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-12)


def test_far_positions_in_half_precision():
    """Fails if angles are computed in bfloat16, where 2,001 is 2,000. The result has bfloat16's 8
    bits: 0.4%."""
    x = tf.ones([1, 1, 1, 2], tf.bfloat16)
    y = tf.cast(rotate(x, tf.constant([2001])), tf.float32).numpy().ravel()
    expected = [np.cos(2001) - np.sin(2001), np.cos(2001) + np.sin(2001)]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=0.02)
