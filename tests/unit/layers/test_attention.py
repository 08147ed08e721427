"""Attention against a plain formula on one device. Parallel: `test_parallel.py`; with a cache:
the tests of `llmos_tf.inference`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.layers import SelfAttention, rotate
from llmos_tf.layers import attention as attention_module

pytestmark = pytest.mark.fast

ROWS, LENGTH, WIDTH, HEADS, SIZE = 2, 6, 10, 4, 6


def attention(num_kv_heads, use_bias, rope_theta):
    layer = SelfAttention(
        WIDTH,
        HEADS,
        num_kv_heads=num_kv_heads,
        head_dim=SIZE,
        use_bias=use_bias,
        rope_theta=rope_theta,
    )
    layer.build()
    rng = np.random.default_rng(0)
    layer.set_weights([rng.normal(size=weight.shape) for weight in layer.weights])
    return layer


def projections(layer, x):
    """Queries, keys and values of each query head."""
    if layer.num_kv_heads == HEADS:
        product = layer.query_key_value
        products = np.einsum("btd,dcnh->cbtnh", x, product.kernel.numpy())
        if product.bias is not None:
            products += product.bias.numpy()[:, np.newaxis, np.newaxis]
        return products
    q = np.einsum("btd,dnh->btnh", x, layer.query.kernel.numpy())
    k, v = np.einsum("btd,dckh->cbtkh", x, layer.key_value.kernel.numpy())
    # Neighbouring query heads share a key-value head.
    group = HEADS // layer.num_kv_heads
    return q, np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)


@pytest.mark.parametrize(
    ("num_kv_heads", "use_bias", "rope_theta"),
    [(4, True, None), (2, False, 50.0), (1, False, None)],
    ids=["heads", "grouped_rotary", "one_kv_head"],
)
def test_formula(float64, num_kv_heads, use_bias, rope_theta):
    """Fails for a wrong scale, mask, order of heads, or query head that reads another's keys."""
    layer = attention(num_kv_heads, use_bias, rope_theta)
    x = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH))
    q, k, v = projections(layer, x)
    if rope_theta is not None:
        positions = tf.range(LENGTH)
        q = rotate(tf.constant(q), positions, rope_theta).numpy()
        k = rotate(tf.constant(k), positions, rope_theta).numpy()
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(SIZE)
    scores = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bnts,bsnh->btnh", weights, v)
    expected = np.einsum("btnh,nhd->btd", mixed, layer.output_product.kernel.numpy())
    if use_bias:
        expected += layer.output_product.bias.numpy()
    np.testing.assert_allclose(layer(tf.constant(x)), expected, atol=1e-11)


def test_a_token_does_not_see_later_ones(float64):
    """Fails if the mask lets a position see the next one."""
    layer = attention(2, False, 50.0)
    x = np.random.default_rng(1).normal(size=(1, LENGTH, WIDTH))
    changed = x.copy()
    changed[:, 4:] += 1.0
    before, after = layer(tf.constant(x)).numpy(), layer(tf.constant(changed)).numpy()
    assert (before[:, :4] == after[:, :4]).all()
    assert (before[:, 4:] != after[:, 4:]).any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_long_rows_are_attended_to_by_blocks(float64, monkeypatch, dropout):
    """Fails if a row of as many positions as a block, or more, keeps all its scores, has another
    result than by one matrix, or weights that are not dropped in training alone."""
    layer = attention(2, False, 50.0)
    layer.weight_dropout.rate = dropout
    if dropout:
        layer.weight_dropout.seed_generator = keras.random.SeedGenerator(0)
    x = tf.constant(np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)))
    documents = tf.constant(np.repeat([[0, 1], [3, 2]], LENGTH // 2, axis=1))
    plain = layer(x, segment_ids=documents)
    monkeypatch.setattr(attention_module, "BLOCK", LENGTH)
    by_blocks = tf.function(layer, autograph=False)
    np.testing.assert_allclose(by_blocks(x, segment_ids=documents), plain, atol=1e-11)
    in_training = by_blocks(x, training=True, segment_ids=documents)
    assert (np.abs(in_training - plain).max() > 0.1) == bool(dropout)
    traced = by_blocks.get_concrete_function(x, segment_ids=documents)
    assert "Softmax" not in {op.type for op in traced.graph.get_operations()}
