"""Held-out loss: every token counts once."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh
from llmos_tf.data import pack_documents
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training.evaluation import evaluate

pytestmark = pytest.mark.fast

CONFIG = GPTConfig(vocab_size=20, max_positions=6, hidden_size=8, num_heads=2, num_layers=1)


@pytest.mark.parametrize("name", ["one device", "data2, tensor2"])
def test_every_token_counts_once(float64, name):
    """Fails if batches weigh alike (the last one has 3 sequences of 5), if padding or the first
    token of a document counts, or if ranks with the same rows count twice."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 20, length) for length in (30, 3, 41)]
    text = pack_documents(documents, sequence_length=6, end_of_document=0)
    assert text.num_sequences == 13
    one = name == "one device"
    strategy = tf.distribute.get_strategy() if one else MeshStrategy(Mesh(data=2, tensor=2))
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = GPT(CONFIG)
    seen = []
    held = evaluate(
        model, text, num_bytes=100, batch_size=5, progress=lambda *steps: seen.append(steps)
    )
    keras.utils.set_random_seed(0)
    logits = GPT(CONFIG)(text.inputs)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(text.targets, logits)
    total = float(tf.reduce_sum(losses * text.weights))
    # Of 30 + 3 + 41 tokens and three ends, the first of each document is not predicted.
    assert held.num_tokens == 74
    # Float64: sums in another order differ by 1e-16 relative.
    assert held.loss == pytest.approx(total / 74, rel=1e-12)
    assert held.bits_per_byte == pytest.approx(total / math.log(2) / 100, rel=1e-12)
    assert held.num_bytes == 100
    assert seen == [(1, 3), (2, 3), (3, 3)]
