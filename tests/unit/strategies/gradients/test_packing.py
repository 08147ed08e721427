"""Buckets: every gradient once, in the order of the backward pass, which goes on meanwhile."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from llmos_tf import Mesh, collectives, devices
from llmos_tf.collectives.annotations import sending
from llmos_tf.planning.buckets import default_bucket_bytes, plan_buckets
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.gradients.packing import packed_rows, unpacked_rows

pytestmark = [pytest.mark.fast, pytest.mark.graph_optimizer]

TENSORS = st.lists(
    st.tuples(st.sampled_from("ab"), st.integers(1, 100), st.integers(0, 20)), max_size=30
)


@given(TENSORS, st.integers(1, 200))
def test_plan(tensors, limit):
    """Fails if a gradient is left out or reduced twice, a bucket is above the limit or mixes kinds,
    or one that is complete later leaves earlier."""
    keys, sizes, made = ({i: t[k] for i, t in enumerate(tensors)} for k in range(3))
    buckets = plan_buckets(keys, sizes, made, {"a": limit, "b": limit})
    members = [i for bucket in buckets for i in bucket.members]
    assert sorted(members) == list(range(len(tensors)))
    for bucket in buckets:
        assert {keys[i] for i in bucket.members} == {bucket.key}
        assert len(bucket.members) == 1 or sum(sizes[i] for i in bucket.members) <= limit
        assert bucket.ready == max(made[i] for i in bucket.members)
        order = [(made[i], -i) for i in bucket.members]
        assert order == sorted(order)
    ready = [bucket.ready for bucket in buckets]
    assert ready == sorted(ready)
    for key in "ab":
        of_key = [made[i] for bucket in buckets if bucket.key == key for i in bucket.members]
        assert of_key == sorted(of_key)


@pytest.mark.parametrize(
    ("ranks", "total", "expected"),
    [(8, 30_000_000, 7_500_000), (2, 10**9, 25 * 2**20), (512, 10**9, 512 * 2**18), (4, 7, 2**20)],
)
def test_default_size(ranks, total, expected):
    """Fails if nothing is left to overlap, or a ring's pieces are too small for its latency."""
    assert default_bucket_bytes(ranks, total) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 5))
def test_rows(lengths, ways, multiple):
    """Fails if padding lands inside a tensor, or a rank's parts are not in its row."""
    tensors = [tf.range(10 * i, 10 * i + n) for i, n in enumerate(lengths, 1)]
    rows = packed_rows(tensors, ways, multiple)
    assert rows.shape[0] == ways and rows.shape[1] % multiple == 0
    for x, y in zip(tensors, unpacked_rows(rows, tensors), strict=True):
        np.testing.assert_array_equal(x, y)


class Slow(keras.layers.Layer):
    """Passes its input on; its backward pass takes half a second on rank 1, and notes its end.

    Then it communicates, as that of a layer which is cut along `tensor` does. It sleeps on one rank
    only, as a sleeping op holds one of TensorFlow's threads, of which there may be two.
    """

    def __init__(self, events):
        super().__init__()
        # Keras would keep a copy of a list.
        self.note = events.append

    def call(self, x):
        def wait(dy, rank):
            if rank == 1:
                time.sleep(0.5)
                self.note("backward")
            return dy

        @tf.custom_gradient
        def slow(x):
            def gradient(dy):
                rank = collectives.axis_index(("data", "tensor"))
                y = tf.numpy_function(wait, [dy, rank], dy.dtype, stateful=False)
                return collectives.all_reduce(tf.ensure_shape(y, dy.shape), "tensor", op="max")

            return tf.identity(x), gradient

        return slow(x)


class Tied(keras.Model):
    """A language model in small, whose table is the last variable."""

    def __init__(self, events):
        super().__init__()
        self.kernels = [keras.layers.Dense(16, use_bias=False) for _ in range(2)]
        self.slow = Slow(events)
        self.table = keras.layers.ReversibleEmbedding(50, 16)

    def call(self, tokens):
        x = self.slow(self.table(tokens))
        for kernel in self.kernels:
            x = kernel(x)
        return self.table(x, reverse=True)


@pytest.mark.parametrize("tensor", [1, 2])
def test_reduces_while_backward_runs(monkeypatch, tensor):
    """Fails if the gradients that are there first wait for those that are made last: as the
    gradient of a tied table, whether it is the first variable or the last. Or if they wait for what
    the backward pass sends itself."""
    events, original = [], tf.raw_ops.CollectiveReduceV2

    def observed(**arguments):
        y = original(**arguments)
        if y.shape.rank != 1 or y.shape[0] < 100:
            return y

        def note(size):
            events.append(int(size))
            return np.float32(0)

        size = tf.cast(tf.size(y), tf.float32) + 0 * y[0]
        return y + tf.reshape(tf.numpy_function(note, [size], tf.float32, stateful=False), [])

    monkeypatch.setattr(tf.raw_ops, "CollectiveReduceV2", observed)
    mesh = Mesh(data=2, tensor=tensor, devices=devices.visible_devices()[: 2 * tensor])
    layout = {"tied/dense/kernel": (None, "tensor")} if tensor > 1 else None
    strategy = MeshStrategy(mesh, bucket_bytes=64, layout_map=layout)
    with strategy.scope():
        model = Tied(events)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
    x = np.zeros((8, 4), "int32")
    # As between devices that share no memory.
    with sending(strategy):
        model.train_on_batch(x, x)
        events.clear()
        model.train_on_batch(x, x)
    # Of each rank two kernels while rank 1 sleeps, the table after it.
    ranks = 2 * tensor
    assert events.index("backward") == 2 * ranks
    assert sorted(events[: 2 * ranks]) == [256 // tensor] * ranks + [256] * ranks
    assert events[2 * ranks + 1 :] == [800] * ranks
