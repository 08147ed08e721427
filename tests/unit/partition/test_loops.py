"""Loops: their variables keep one placement, and rows stay apart in them."""

import pytest
import tensorflow as tf
from unit.partition.running import ROWS, check_parity, partitioned, plan_of, sent, without_rule

from llmos_tf.partition.graph.inference import loop_variables
from llmos_tf.partition.graph.placements import Sharded

pytestmark = pytest.mark.fast

ROWS_OF_4 = [None, 4]


def coupled(x):
    """Each iteration needs the mean of all rows."""

    def body(i, y):
        return i + 1, tf.tanh(y) * x + tf.reduce_mean(y)

    return tf.while_loop(lambda i, y: i < 3, body, (0, x))[1]


def sum_over_rows(x):
    """An accumulator that is a sum over rows, reduced once after the loop."""

    def body(i, total):
        return i + 1, total + tf.reduce_sum(x[:, i]) / 10.0

    count = tf.shape(x)[1]
    total = tf.while_loop(lambda i, t: i < count, body, (0, tf.zeros([], x.dtype)))[1]
    return x * total


def until_small(x):
    """How often it goes on depends on the rows of all ranks."""

    def goes_on(i, y):
        return tf.reduce_max(tf.abs(y)) > 0.05

    return tf.while_loop(goes_on, lambda i, y: (i + 1, y * 0.7), (0, x))[1]


def with_condition(x):
    def body(i, y):
        positive = tf.reduce_sum(y) > 0.0
        return i + 1, tf.cond(positive, lambda: tf.sin(y) + tf.reduce_mean(y), lambda: y * x)

    return tf.while_loop(lambda i, y: i < 4, body, (0, x))[1]


def nested(x):
    def outer(i, y):
        def inner(j, z):
            return j + 1, tf.sin(z) + tf.reduce_mean(x)

        return i + 1, tf.while_loop(lambda j, z: j < i + 1, inner, (0, y))[1]

    return tf.while_loop(lambda i, y: i < 3, outer, (0, x))[1]


def growing(x):
    """A variable whose shape changes is computed whole."""

    def body(i, y):
        return i + 1, tf.concat([y, y[:1]], 0)

    shapes = (tf.TensorShape([]), tf.TensorShape([None, 4]))
    return tf.while_loop(lambda i, y: i < 2, body, (0, x), shapes)[1][: tf.shape(x)[0]]


def swapped(x):
    """A variable that has rows and another dimension in turns is computed whole."""
    square = tf.matmul(x, x, transpose_b=True)
    y = tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, tf.transpose(y) * 0.5), (0, square))
    return y[1]


def limited(x):
    body = lambda i, y: (i + 1, y * 0.9)  # noqa: E731
    return tf.while_loop(lambda i, y: True, body, (0, x), maximum_iterations=3)[1]


FUNCTIONS = [
    coupled,
    sum_over_rows,
    until_small,
    with_condition,
    nested,
    growing,
    swapped,
    limited,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_loops_have_the_values_and_gradients_of_one_device(function):
    # Fails if a variable of a loop is taken in a placement that the body does not keep.
    check_parity(function, ways=(2,))


def test_ranks_without_rows_take_part_in_a_loop():
    # Fails if a rank without rows leaves a loop that communicates.
    check_parity(coupled, ROWS[:2], ways=(3,))


def test_a_sum_over_rows_is_reduced_once():
    # Fails if the accumulator is reduced in each iteration.
    plan = plan_of(sum_over_rows, ROWS_OF_4)
    assert sent(plan) == ["StatelessWhile"]
    assert plan.outputs == [Sharded(0)]


def test_what_a_loop_does_not_change_is_gathered_outside():
    # Fails if an invariant is gathered in each iteration.
    def with_sorted(x):
        y = tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y + tf.sort(x, axis=0)), (0, x))
        return y[1]

    plan = plan_of(with_sorted, ROWS_OF_4)
    inner = [
        change
        for step in plan.steps
        if hasattr(step, "node")
        for p in step.node.plans
        for change in p.changes
    ]
    assert all(change.value.node.type != "Placeholder" for change in inner)
    check_parity(with_sorted, ways=(2,))


def test_the_gradient_of_a_loop_sends_no_rows():
    # Fails if shapes are not known in the loop that computes the gradient.
    def gradient(x, w):
        with tf.GradientTape() as tape:
            tape.watch(w)
            body = lambda i, y: (i + 1, tf.tanh(tf.matmul(y, w)))  # noqa: E731
            loss = tf.reduce_sum(tf.while_loop(lambda i, y: i < 3, body, (0, x))[1])
        return tape.gradient(loss, w)

    plan = plan_of(lambda x: gradient(x, tf.ones([4, 4], tf.float64)), ROWS_OF_4)
    assert sent(plan) == ["Identity"]
    assert without_rule(plan) == []


def test_which_variables_a_body_changes():
    # Fails if what a loop captures is taken for a variable that changes.
    def loop(x):
        return tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, x), (0, x))[1]

    graph = tf.function(loop, autograph=False).get_concrete_function(tf.ones([2])).graph
    (op,) = [op for op in graph.get_operations() if "While" in op.type]
    body = graph._get_function(op.get_attr("body").name).graph
    # Two counters and the bound of one, y, and x.
    assert loop_variables(body) == [True, False, True, True, False]


def test_a_stateful_body_writes_once_for_all_ranks():
    # Fails if a variable is read outside of a loop that writes it.
    def counted(x):
        def body(i, y):
            return i + 1, y + tf.cast(i, y.dtype)

        return [tf.while_loop(lambda i, y: i < 3, body, (0, x))[1]]

    assert partitioned(counted, ROWS, 2)[0].shape == ROWS.shape
