"""Attention over the positions of all ranks against the same attention on one device.

In float64 sums in another order differ by 1e-16 relative; 1e-11 allows for the terms of these sums.
"""

import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf
from lanes import usual

from llmos_tf import Mesh
from llmos_tf.layers.activation_sharding import Stream
from llmos_tf.layers.blockwise_attention import plain_attention
from llmos_tf.layers.masks import Mask, WeightDropout
from llmos_tf.layers.ring_attention import ring_attention, ulysses_attention
from llmos_tf.strategies import MeshStrategy

TOLERANCE = 1e-11
ROWS, LENGTH, WIDTH = 2, 16, 3
METHODS = {"ring": ring_attention, "ulysses": ulysses_attention}
MESHES = {
    "context2": (Mesh(context=2), ("context",)),
    "context4": (Mesh(context=4), ("context",)),
    "expert2-context2": (Mesh(expert=2, context=2), ("expert", "context")),
}
# Query heads, key-value heads, and whether rows hold several documents. 4 ranks have 2 key-value
# heads twice; of 8 query heads each has 2 then, and half of those of its key-value head.
CASES = {
    "heads": (4, 4, False),
    "grouped": (4, 2, True),
    "one_kv_head": (4, 1, True),
    "many": (8, 2, False),
}


def inputs(num_q, num_kv):
    """q, k, v and a cotangent ``[B, T, heads, H]``; documents ``[B, T]``."""
    rng = np.random.default_rng(0)
    sizes = (num_q, num_kv, num_kv, num_q)
    arrays = [rng.normal(size=(ROWS, LENGTH, heads, WIDTH)) for heads in sizes]
    documents = np.array([np.repeat([5, 2, 5], [3, 8, 5]), np.repeat([1, 2], [9, 7])])
    return [tf.constant(array) for array in arrays], tf.constant(documents, tf.int32)


def heads_first(x):
    return tf.transpose(x, [0, 2, 1, 3])


def measured(stream, attention, arrays):
    """The result and the gradients of q, k and v, ``[B, T, heads, H]`` of all positions."""
    q, k, v, cotangent = (stream.enter(x) for x in arrays)
    with tf.GradientTape() as tape:
        tape.watch([q, k, v])
        o = heads_first(attention(*(heads_first(x) for x in (q, k, v))))
    gradients = tape.gradient(o, [q, k, v], output_gradients=cotangent)
    return [stream.leave(x) for x in (o, *gradients)]


@functools.cache
def one_device(num_q, num_kv, has_documents):
    arrays, documents = inputs(num_q, num_kv)
    positions = tf.range(LENGTH)
    segments = documents if has_documents else None
    mask = Mask(positions, positions, segments, segments)
    return measured(Stream(), lambda q, k, v: plain_attention(q, k, v, mask, tf.identity), arrays)


@pytest.mark.parametrize(
    ("method", "mesh"),
    usual(
        itertools.product(METHODS, MESHES),
        ("ring", "context2"),
        ("ring", "context4"),
        ("ulysses", "expert2-context2"),
    ),
)
def test_ranks_see_the_positions_of_all(method, mesh):
    """Fails for keys that come from another rank than is thought, a piece that is selected wrongly,
    a gradient of keys that stops at another rank, or a head that is dealt to the wrong one."""
    over, axes = MESHES[mesh]
    stream = Stream(position_axes=axes, zigzag=method == "ring")

    def program():
        results = {}
        for name, (num_q, num_kv, has_documents) in CASES.items():
            arrays, documents = inputs(num_q, num_kv)
            segments = stream.enter(documents) if has_documents else None
            attention = functools.partial(METHODS[method], axes=axes, segments_BL=segments)
            results[name] = measured(stream, attention, arrays)
        return results

    strategy = MeshStrategy(over)
    results = tf.function(lambda: strategy.run(program), autograph=False)()
    for name, values in results.items():
        for i, (actual, expected) in enumerate(zip(values, one_device(*CASES[name]), strict=True)):
            np.testing.assert_allclose(actual, expected, atol=TOLERANCE, err_msg=f"{name} {i}")


@pytest.mark.parametrize("method", METHODS)
def test_dropout_of_weights_is_the_same_backward(method):
    """Fails if backward draws other masks than forward: o is linear in v, so that o · do is v · dv,
    and dq is the slope of o · do, by differences of 1e-6 exact to some 1e-9."""
    arrays, _ = inputs(4, 2)
    stream = Stream(position_axes=("context",), zigzag=method == "ring")

    def program():
        rank = tf.distribute.get_replica_context().axis_index("context")
        dropout = WeightDropout(0.3, tf.stack([7, rank]))

        def attention(q, k, v):
            return METHODS[method](q, k, v, ("context",), None, dropout)

        q, k, v, cotangent = arrays
        o, dq, _, dv = measured(stream, attention, arrays)
        step = 1e-6
        more, *_ = measured(stream, attention, [q + step * q, k, v, cotangent])
        less, *_ = measured(stream, attention, [q - step * q, k, v, cotangent])
        sums = [tf.reduce_sum(x * y) for x, y in ((o, cotangent), (v, dv), (q, dq))]
        return *sums, tf.reduce_sum((more - less) * cotangent) / (2 * step), o

    strategy = MeshStrategy(Mesh(context=2))
    mixed, by_v, slope, difference, o = tf.function(
        lambda: strategy.run(program), autograph=False
    )()
    np.testing.assert_allclose(by_v, mixed, atol=TOLERANCE)
    np.testing.assert_allclose(slope, difference, atol=1e-7)
    assert np.abs(o - one_device(4, 2, False)[0]).max() > 0.1


def test_a_step_of_the_ring_is_two_products_of_pieces():
    """Fails if a rank computes scores that the mask takes away: of [lo, hi] × [lo, hi] three pieces
    are needed of its own keys, and two of the other ranks'."""
    ways, counts = 4, []

    def program():
        arrays, _ = inputs(4, 4)
        stream = Stream(position_axes=("context",), zigzag=True)
        q, k, v = (heads_first(stream.enter(x)) for x in arrays[:3])
        graph = tf.compat.v1.get_default_graph()
        before = len(graph.get_operations())
        ring_attention(q, k, v, ("context",))
        products = [op for op in graph.get_operations()[before:] if op.type == "BatchMatMulV2"]
        counts.append({tuple(op.inputs[0].shape[2:3]) for op in products})
        counts.append(len(products))

    strategy = MeshStrategy(Mesh(context=ways))
    tf.function(lambda: strategy.run(program), autograph=False)()
    pieces, count = counts
    assert pieces == {(LENGTH // (2 * ways),)}
    # Each of scores and of values.
    assert count == 2 * (3 + 2 * (ways - 1))


def test_ulysses_needs_heads_for_all_ranks():
    """Fails if heads that cannot be dealt evenly are not refused by name."""
    x = tf.zeros([1, 6, 2, 3])
    strategy = MeshStrategy(Mesh(context=4))
    with pytest.raises(ValueError, match=r"6 query heads to 4 ranks.*'ring'"):
        strategy.run(lambda: ulysses_attention(x, x, x, ("context",)))
