"""Cross-entropy of tokens on one device. On vocabulary-parallel logits: `test_parallel.py`."""

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.layers import TokenCrossEntropy

pytestmark = pytest.mark.fast


def test_the_loss_is_averaged_by_token_weight(float64):
    """Fails if rows are averaged and not tokens, or if tokens of weight zero count."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 7)), rng.integers(0, 7, (3, 4))
    weights = rng.random((3, 4)) * (rng.random((3, 4)) > 0.4)
    log_sum = np.log(np.exp(logits).sum(-1))
    losses = log_sum - np.take_along_axis(logits, labels[..., np.newaxis], -1)[..., 0]
    logits, labels = tf.constant(logits), tf.constant(labels)
    loss = TokenCrossEntropy()
    np.testing.assert_allclose(loss(labels, logits), losses.mean(), atol=1e-13)
    weighted = (losses * weights).sum() / weights.sum()
    np.testing.assert_allclose(loss(labels, logits, sample_weight=weights), weighted, atol=1e-13)
    each = TokenCrossEntropy(reduction=None)(labels, logits)
    np.testing.assert_allclose(each, losses, atol=1e-13)
