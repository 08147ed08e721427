"""Routers: which experts, with which weights, and the losses that keep them in order."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.layers.router import Router, load_balance_loss, router_z_loss

pytestmark = pytest.mark.fast


def random(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_the_best_experts_and_their_softmax(float64):
    """Fails if weights are a softmax over all experts (they would not sum to 1), or belong to
    other experts than those beside them."""
    router = Router(5, num_experts=4, num_experts_per_token=2)
    router.build()
    router.set_weights([random(5, 4)])
    x = random(2, 3, 5)
    logits, experts, weights = router(tf.constant(x))
    expected = x @ random(5, 4)
    best = np.argsort(-expected, -1)[..., :2]
    chosen = np.exp(np.take_along_axis(expected, best, -1))
    np.testing.assert_allclose(logits, expected, atol=1e-12)
    np.testing.assert_array_equal(experts, best)
    np.testing.assert_allclose(weights, chosen / chosen.sum(-1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float64"])
def test_it_chooses_in_float32_or_wider(policy):
    """Fails if the router's product or softmax is of 16 bits, or a float64 model's is not."""
    keras.config.set_dtype_policy(policy)
    router = Router(5, 4, 2)
    logits, _, weights = router(tf.constant(random(2, 3, 5), router.compute_dtype))
    wide = "float64" if policy == "float64" else "float32"
    assert (router.kernel.dtype, logits.dtype, weights.dtype) == (wide, wide, wide)


def test_load_balance_loss_is_least_where_experts_are_equally_busy():
    """Fails for a missing factor E, a sum for a mean, or a gradient through the counts. Uniform
    logits give 1; where all tokens are sent to one expert and sure of it, E."""
    uniform = tf.zeros([2, 3, 4])
    assert float(load_balance_loss(uniform, tf.fill([4], 0.25))) == pytest.approx(1)
    sure = tf.one_hot(tf.zeros([2, 3], tf.int32), 4, on_value=100.0)
    share = tf.constant([1.0, 0, 0, 0])
    with tf.GradientTape() as tape:
        tape.watch(share)
        loss = load_balance_loss(sure, share)
    assert float(loss) == pytest.approx(4)
    assert tape.gradient(loss, share) is None


def test_z_loss_is_the_mean_square_of_the_log_partition():
    """Fails if the square is of another thing, or the mean not over tokens. Zeros give ln(4)²."""
    logits = tf.constant([[[0.0, 0, 0, 0], [1.0, 1, 1, 1]]])
    expected = (np.log(4) ** 2 + (1 + np.log(4)) ** 2) / 2
    assert float(router_z_loss(logits)) == pytest.approx(expected, rel=1e-6)
