"""Conditions: branches are partitioned, and all ranks take the same one."""

import numpy as np
import pytest
import tensorflow as tf
from unit.partition.running import (
    ROWS,
    check_parity,
    partitioned,
    plan_of,
    sent,
    without_rule,
)

from llmos_tf.partition.conditions import agreed
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Sharded

pytestmark = pytest.mark.fast

ROWS_OF_4 = [None, 4]


def centred_if_positive(x):
    return tf.cond(
        tf.reduce_mean(x) > 0.0, lambda: tf.sin(x) - tf.reduce_mean(x), lambda: tf.tanh(x) * 2.0
    )


def one_of_three(x):
    def filled():
        return tf.zeros_like(x) + tf.reduce_mean(x)

    index = tf.cast(tf.reduce_sum(x) > 0.0, tf.int32) + 1
    return tf.switch_case(index, [lambda: x, lambda: x * 0.5, filled])


def nested(x):
    inner = tf.reduce_max(x) > 100.0
    return tf.cond(
        tf.reduce_sum(x) < 1e9,
        lambda: tf.cond(inner, lambda: x, lambda: x * tf.reduce_max(x)),
        lambda: tf.zeros_like(x),
    )


def checked(x):
    limit = tf.constant(1e9, x.dtype)
    with tf.control_dependencies([tf.debugging.assert_less(x, limit, [x])]):
        return tf.sin(x)


FUNCTIONS = [centred_if_positive, one_of_three, nested, checked]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_conditions_have_the_values_and_gradients_of_one_device(function):
    # Fails if ranks take unlike branches, or a mean in a branch is that of a rank's rows.
    check_parity(function)
    check_parity(function, -ROWS, ways=(2,))


def test_branches_keep_rows_apart():
    # Fails if a condition is computed whole: its inputs would be gathered.
    plan = plan_of(centred_if_positive, ROWS_OF_4)
    assert plan.outputs == [Sharded(0)]
    assert sent(plan) == ["Mean", "Mean"]
    assert without_rule(plan) == []


def test_assertions_gather_no_data():
    # Fails if the data that a failing assertion prints is gathered in every step.
    plan = plan_of(checked, ROWS_OF_4)
    assert sent(plan) == ["All"]
    assert "Assert" not in without_rule(plan)


def test_a_failing_assertion_fails_on_all_ranks():
    # Fails if an assertion is left out, or a rank waits for another one that has failed.
    def positive(x):
        with tf.control_dependencies([tf.debugging.assert_positive(x, "not positive")]):
            return [tf.identity(x)]

    with pytest.raises(tf.errors.OpError):
        partitioned(positive, -np.abs(ROWS), 2)
    np.testing.assert_array_equal(partitioned(positive, np.abs(ROWS), 2)[0], np.abs(ROWS))


def test_parts_of_a_sum_pass_a_condition():
    # Fails if a gradient is reduced by each rank before the branch that does not need it.
    def scaled(x, w):
        total = tf.matmul(x, x, transpose_a=True)
        return tf.cond(tf.reduce_sum(w) > 0.0, lambda: total * 2.0, lambda: total) + 1.0

    plan = plan_of(scaled, ROWS_OF_4, [])
    # What the condition returns, once.
    assert sent(plan) == ["Identity"]


def test_agreed_placements():
    # Fails if branches that differ are not brought together, or one without rows decides.
    value = plan_of(lambda x: x + 1.0, ROWS_OF_4).steps[-1].node.outputs[0]
    assert agreed([Sharded(0), None], value) == Sharded(0)
    assert agreed([REPLICATED, Sharded(0)], value) == Sharded(0)
    assert agreed([PARTIAL, REPLICATED], value) == PARTIAL
    assert agreed([Sharded(0), Sharded(1)], value) == REPLICATED
    assert agreed([REPLICATED, Sharded(1)], value) == REPLICATED
    assert agreed([None, None], value) == Sharded(0)
