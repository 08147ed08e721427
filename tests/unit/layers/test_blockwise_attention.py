"""Attention by blocks of keys against softmax(q kᵀ / sqrt(H)) v, forward and backward.

In float64 sums in another order differ by 1e-16 relative; 1e-11 allows for the terms of these sums.
"""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf.layers import online_softmax
from llmos_tf.layers.blockwise_attention import blockwise_attention, plain_attention
from llmos_tf.layers.masks import Mask, WeightDropout

pytestmark = pytest.mark.fast

TOLERANCE = 1e-11


def formula(q, k, v, visible, kept=None):
    """Attention by its definition; `kept` is what dropout multiplies the weights by."""
    group = q.shape[1] // k.shape[1]
    k, v = tf.repeat(k, group, axis=1), tf.repeat(v, group, axis=1)
    scores = tf.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = tf.nn.softmax(tf.where(visible, scores, -np.inf))
    return tf.einsum("bnts,bnsh->bnth", weights if kept is None else weights * kept, v)


def tensors(rows, num_q, num_kv, length, width, num_keys=None, seed=0):
    """q, k, v and a cotangent of the result."""
    rng = np.random.default_rng(seed)
    queries, keys = (rows, num_q, length, width), (rows, num_kv, num_keys or length, width)
    return [tf.constant(rng.normal(size=shape)) for shape in (queries, keys, keys, queries)]


def measured(attention, q, k, v, cotangent):
    """The result, and the gradients of q, k and v."""
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        o = attention(q, k, v)
    return o, *tape.gradient(o, [q, k, v], output_gradients=cotangent)


def assert_same(attention, reference, arguments):
    for actual, expected in zip(
        measured(attention, *arguments), measured(reference, *arguments), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(
    num_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    length=st.integers(1, 16),
    block=st.integers(1, 20),
    cuts=st.none() | st.lists(st.integers(0, 16), max_size=3),
    in_order=st.booleans(),
    seed=st.integers(0, 9),
)
def test_blocks_give_what_one_matrix_gives(num_kv, group, length, block, cuts, in_order, seed):
    """Fails for a running sum that is not scaled when a larger score comes, a masked first block
    that stays, a block whose gradient is laid elsewhere, a query head that reads another's keys, or
    a piece of the queries that sees too few keys."""
    arguments = tensors(2, num_kv * group, num_kv, length, 3, seed=seed)
    # Scores of 100 and more overflow an exponential from which no maximum is taken.
    arguments[0] *= 100.0
    positions = np.arange(length)
    visible = positions <= positions[:, np.newaxis]
    segments = None
    if cuts is not None:
        first = np.searchsorted(sorted(cuts), positions, side="right")
        segments = np.stack([first, np.zeros(length, int)])
        visible = visible & (segments[:, np.newaxis] == segments[:, :, np.newaxis])
        visible, segments = visible[:, np.newaxis], tf.constant(segments)
    mask = Mask(tf.constant(positions), tf.constant(positions), segments, segments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_softmax, "BLOCK", block)
        assert_same(
            lambda q, k, v: blockwise_attention(q, k, v, mask, in_order=in_order),
            lambda q, k, v: formula(q, k, v, visible),
            arguments,
        )
    assert_same(
        lambda q, k, v: plain_attention(q, k, v, mask, tf.identity),
        lambda q, k, v: formula(q, k, v, visible),
        arguments,
    )


def test_positions_need_not_be_in_order_and_a_mask_need_not_be():
    """Fails for a mask by the place of a key in place of its position, or one that is always
    there."""
    arguments = tensors(2, 4, 2, 5, 3, num_keys=8)
    queries, keys = np.array([9, 2, 7, 4, 3]), np.array([5, 0, 1, 3, 2, 8, 6, 2])
    mask = Mask(tf.constant(queries), tf.constant(keys))
    for each, visible in ((mask, keys <= queries[:, np.newaxis]), (Mask(), True)):
        assert_same(
            lambda q, k, v, each=each: blockwise_attention(q, k, v, each),
            lambda q, k, v, visible=visible: formula(q, k, v, visible),
            arguments,
        )


@pytest.mark.parametrize("in_order", [False, True])
def test_dropout_draws_the_same_weights_backward(monkeypatch, in_order):
    """Fails if backward draws another mask, drops before the weights are normalized, or two blocks
    or pieces share a mask."""
    monkeypatch.setattr(online_softmax, "BLOCK", 4)
    length, rate = 8, 0.4
    arguments = tensors(2, 2, 1, length, 3)
    positions = tf.range(length)
    mask = Mask(positions, positions)
    dropout = WeightDropout(rate, tf.constant([3, 5]))
    kept = np.zeros((2, 2, length, length))
    pieces = 4 if in_order else 1
    for piece in range(pieces):
        size, seen = length // pieces, (piece + 1) * length // pieces
        blocks = -(-seen // 4)
        for block in range(blocks):
            part = dropout.at(piece * online_softmax.MAX_BLOCKS).at(block)
            drawn = part(tf.ones([2, 2, size, seen // blocks], tf.float64))
            width = seen // blocks
            rows = slice(piece * size, (piece + 1) * size)
            kept[:, :, rows, block * width : (block + 1) * width] = drawn
    assert_same(
        lambda q, k, v: blockwise_attention(q, k, v, mask, dropout, in_order=in_order),
        lambda q, k, v: formula(q, k, v, mask.visible(), kept),
        arguments,
    )
    seen = kept[:, :, -1]
    assert (seen[..., :4] != seen[..., 4:]).any()


@pytest.mark.parametrize(("dtype", "length"), [("bfloat16", 512), ("float16", 4096)])
def test_sums_are_of_float32(monkeypatch, dtype, length):
    """Fails if sums are taken in 16 bits, which count to 256 or 2,048 only: keys of value 0, then
    as many of value 1, would have the mean 1."""
    monkeypatch.setattr(online_softmax, "BLOCK", 1)
    keys = tf.ones([1, 1, length, 2], dtype)
    values = tf.concat([tf.zeros_like(keys[:, :, ::2]), keys[:, :, ::2]], axis=2)
    attention = tf.function(blockwise_attention, autograph=False)
    o = attention(keys[:, :, :1], keys, values, Mask())
    assert o.dtype == dtype
    np.testing.assert_allclose(tf.cast(o, tf.float32), 0.5, atol=1e-3)


@pytest.mark.parametrize(
    ("length", "count"), [(None, 1), (1, 1), (1024, 1), (1025, 5), (4096, 4), (1031, 1)]
)
def test_number_of_blocks(length, count):
    """Fails for blocks that do not make up the keys, are longer than the limit, or tiny."""
    assert online_softmax._num_blocks(length) == count
