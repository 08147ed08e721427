"""Tensor lists have the placement of their elements, across loops and conditions."""

import pytest
import tensorflow as tf
from unit.partition.running import check_parity, plan_of, sent, without_rule

from llmos_tf.partition.graph.placements import Sharded

pytestmark = pytest.mark.fast

ROWS_OF_4 = [None, 4]


def written_in_a_loop(x):
    array = tf.TensorArray(x.dtype, size=4)

    def body(i, array):
        return i + 1, array.write(i, x * tf.cast(i, x.dtype))

    array = tf.while_loop(lambda i, a: i < 4, body, (0, array))[1]
    return tf.reduce_mean(array.stack(), 0) + array.read(2)


def growing(x):
    array = tf.TensorArray(x.dtype, size=0, dynamic_size=True, clear_after_read=False)

    def body(i, array):
        return i + 1, array.write(i, x * tf.cast(i, x.dtype))

    array = tf.while_loop(lambda i, a: i < 4, body, (0, array))[1]
    return array.read(1) + array.read(3)


def unrolled(x):
    array = tf.TensorArray(x.dtype, size=2, clear_after_read=False)
    array = array.write(0, tf.sin(x)).write(1, x)
    return array.read(0) * array.read(1) + array.concat()[: tf.shape(x)[0]]


def gathered(x):
    array = tf.TensorArray(x.dtype, size=4).unstack(tf.transpose(x))
    return tf.transpose(array.gather([2, 0])) * 2.0


def scan_over_positions(x):
    states = tf.scan(lambda a, r: a * 0.5 + tf.tanh(r), tf.transpose(x), tf.zeros_like(x[:, 0]))
    return tf.transpose(states)


def map_over_rows(x):
    return tf.map_fn(lambda row: tf.tanh(row) * tf.reduce_sum(row), x)


def scan_over_rows(x):
    return tf.scan(lambda a, row: a * 0.5 + tf.tanh(row), x)


def unset(x):
    """An element that was never set is zeros."""
    array = tf.TensorArray(x.dtype, size=3, element_shape=[None, 4], clear_after_read=False)
    return array.write(1, x).read(1) * 3.0


def condition_in_a_loop(x):
    """The gradient keeps optional values of the branches in lists."""

    def body(i, y):
        return i + 1, tf.cond(i > 1, lambda: tf.sin(y) * y, lambda: tf.tanh(y) * x)

    return tf.while_loop(lambda i, y: i < 4, body, (0, x))[1]


FUNCTIONS = [
    written_in_a_loop,
    growing,
    unrolled,
    gathered,
    scan_over_positions,
    map_over_rows,
    scan_over_rows,
    unset,
    condition_in_a_loop,
]
APART = [written_in_a_loop, gathered, scan_over_positions, condition_in_a_loop]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_lists_have_the_values_and_gradients_of_one_device(function):
    # Fails if a list is read as one of whole elements where ranks have stored their rows.
    check_parity(function, ways=(2,))


@pytest.mark.parametrize("function", APART, ids=lambda f: f.__name__)
def test_elements_keep_rows_apart(function):
    # Fails if the shape of what a loop stores and reads is not followed.
    plan = plan_of(function, ROWS_OF_4)
    assert sent(plan) == []
    assert without_rule(plan) == []
    assert plan.outputs == [Sharded(0)]
