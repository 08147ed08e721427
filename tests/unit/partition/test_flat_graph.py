"""Shapes of a flat graph: what follows from the number of rows, and what only seems to."""

import numpy as np
import pytest
import tensorflow as tf
from partitioning.harness import Partitioned

_ROWS = np.arange(24.0).reshape([8, 3]) - 7


def _num_rows(x):
    return tf.shape(x)[0]


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: tf.minimum(_num_rows(x), 64),
        lambda x: tf.cast(_num_rows(x) > 100, tf.int32),
        lambda x: _num_rows(x) // 100,
        lambda x: x[: tf.minimum(_num_rows(x), 64)],
        lambda x: tf.math.top_k(x[:, 0], tf.minimum(_num_rows(x), 64)).values,
        lambda x: tf.reduce_sum(tf.tile(x[: _num_rows(x) // 2], [2, 1]), 1),
    ],
    ids=["minimum", "comparison", "quotient", "slice", "top_k", "halves"],
)
@pytest.mark.parametrize("num_rows", [8, 7])
def test_what_few_rows_do_not_share_with_many(fn, num_rows):
    # Fails if the shapes of large batches alone tell what is a constant, or counts rows.
    Partitioned(fn, [_ROWS], [True]).compare(2, [_ROWS[:num_rows]])


def test_a_gradient_of_one_row():
    # Fails if a rank reduces other dimensions than the plan says: of one row, TensorFlow finds that
    # a dimension of 1 was broadcast to 1.
    def fn(x):
        y = tf.reduce_sum(x * tf.reduce_sum(x, 1, keepdims=True))
        return tf.gradients(y, x)

    partitioned = Partitioned(fn, [_ROWS], [True])
    for num_rows in (8, 1):
        partitioned.compare(3, [_ROWS[:num_rows]])


def test_a_gradient_of_a_concatenation():
    # Fails if the place of a part is not known: the gradient is then gathered to be sliced.
    def fn(x):
        return tf.gradients(tf.square(tf.concat([x, 2 * x], 1)), x)

    partitioned = Partitioned(fn, [_ROWS], [True])
    partitioned.compare(2, [_ROWS])
    assert (partitioned.without_rule, partitioned.gathers) == ([], [])
