"""The fullest moment of small programs, whose answer is known."""

import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf.graph.inlining import ProgramOps
from llmos_tf.memory.liveness import fullest_moment
from llmos_tf.memory.value_kinds import kinds_of_values

pytestmark = pytest.mark.fast

N = 1000
FLOATS = 4 * N
# Scalars and shapes, a few of them.
SMALL = 100


def ops_of(function, *shapes):
    specs = [tf.TensorSpec(shape) for shape in shapes]
    return ProgramOps(tf.function(function, autograph=False).get_concrete_function(*specs).graph)


def peak(function, *shapes):
    return fullest_moment(ops_of(function, *shapes)).total


def near(size):
    return lambda seen: size <= seen <= size + SMALL


def test_what_is_used_later_is_kept():
    """Fails if an output is freed before its last use, or lives on after it."""

    def chain(x):
        kept = [tf.cumsum(x)]
        for _ in range(4):
            kept.append(tf.cumsum(kept[-1]))
        return tf.reduce_sum(kept[0]) + tf.reduce_sum(kept[-1])

    def backward(x):
        kept = [tf.cumsum(x)]
        for _ in range(4):
            kept.append(tf.cumsum(kept[-1]))
        y = tf.cumsum(kept[-1])
        for z in reversed(kept):
            y = tf.cumsum(y + z)
        return tf.reduce_sum(y)

    # The one before and the one that is made of it; the first is summed at once.
    assert near(2 * FLOATS)(peak(chain, [N]))
    # Five that are kept, and one that the backward pass begins with.
    assert near(6 * FLOATS)(peak(backward, [N]))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6))
def test_elementwise_ops_write_over_their_input(count):
    """Fails if an op takes new memory where TensorFlow writes over an input that nobody needs."""

    def function(x):
        y = tf.cumsum(x)
        for _ in range(count):
            y = tf.reshape(tf.tanh(y * 2.0), [-1])
        return y

    assert near(FLOATS)(peak(function, [N]))
    # The input is the caller's.
    assert near(FLOATS)(peak(lambda x: tf.tanh(x), [N]))


def test_calls_stand_in_the_program():
    """Fails if what a called function makes within it, or what its caller holds, is not seen."""
    inner = tf.function(
        lambda x: tf.cumsum(tf.cumsum(tf.cumsum(x))),
        autograph=False,
        experimental_attributes={"_noinline": True},
    )
    assert near(2 * FLOATS)(peak(lambda x: inner(x), [N]))
    # A function that is not inlined has its argument until it is through.
    assert near(3 * FLOATS)(peak(lambda x: inner(tf.cumsum(x)), [N]))


def test_a_call_begins_when_its_arguments_are_there():
    """Fails if what a function makes of nothing, such as dropout's numbers, is there from the
    beginning of a step, for all blocks whose backward pass is a function that draws them again."""
    inner = tf.function(
        lambda x: x * tf.reduce_sum(tf.cumsum(tf.random.stateless_uniform([N], [1, 2]))),
        autograph=False,
        experimental_attributes={"_noinline": True},
    )

    def twice(x):
        return inner(inner(tf.reduce_sum(tf.cumsum(x))))

    assert near(2 * FLOATS)(peak(twice, [N]))


def test_calls_in_an_imported_graph_are_looked_into():
    """Fails if what functions call is not found in a graph that was made of a definition, as the
    parts of a pipeline are."""
    inner = tf.function(lambda x: tf.cumsum(tf.cumsum(tf.cumsum(x))), autograph=False)
    outer = tf.function(lambda x: tf.cumsum(inner(x)), autograph=False)
    concrete = tf.function(lambda x: outer(x), autograph=False).get_concrete_function(
        tf.TensorSpec([N])
    )
    definition, result = concrete.graph.as_graph_def(), concrete.graph.outputs[0].name

    def imported(x):
        given = {concrete.graph.inputs[0].name: x}
        (y,) = tf.graph_util.import_graph_def(definition, given, [result], name="")
        return y

    ops = ops_of(imported, [N])
    assert [work.kind for work in ops.works].count("Cumsum") == 4
    assert near(2 * FLOATS)(fullest_moment(ops).total)


def test_what_xla_compiles_is_one_loop():
    """Fails if temporaries of a compiled function's elements count, or if a matrix does not."""

    def elements(x):
        return tf.exp(x) * tf.tanh(x) + tf.sin(x)

    def matrix(x):
        return tf.reduce_sum(tf.matmul(tf.reshape(x, [-1, 1]), tf.reshape(x, [1, -1])), 0)

    elements, matrix = (
        tf.function(f, autograph=False, jit_compile=True) for f in (elements, matrix)
    )
    # What it is given is not written over.
    assert near(2 * FLOATS)(peak(lambda x: elements(tf.cumsum(x)), [N]))
    assert near(N * FLOATS + FLOATS)(peak(lambda x: matrix(x), [N]))


def test_rows_that_are_taken_are_no_copies():
    """Fails if rows count twice, or if columns are taken to lie together."""

    def pieces(take):
        return lambda x: sum(tf.reduce_sum(y) for y in take(tf.cumsum(x)))

    rows, columns = (lambda x, axis=axis: tf.split(x, 2, axis) for axis in (0, 1))
    assert near(4 * 640)(peak(pieces(rows), [10, 64]))
    assert near(2 * 4 * 640)(peak(pieces(columns), [10, 64]))
    # Only where rows begin at multiples of 64 bytes.
    assert near(2 * FLOATS)(peak(pieces(rows), [10, N // 10]))
    assert near(4 * 640)(peak(pieces(tf.unstack), [10, 64]))
    assert near(4 * 640)(peak(pieces(lambda x: [x[2], x[3:5]]), [10, 64]))
    assert near(4 * 640 + 80)(peak(pieces(lambda x: [x[:, 2], x[:, 3]]), [10, 64]))


def test_a_product_of_unknown_shape():
    """Fails if it is taken to be as large as one of its factors."""

    def function(x, y):
        order = tf.cast(x[0, :2], tf.int32)
        return tf.matmul(y, tf.transpose(x, order))

    # The transpose, and what is made of it.
    assert near(4 * (2000 + 6000))(peak(function, [200, 10], [30, 10]))


def test_a_loop_holds_what_it_carries_and_its_body():
    """Fails if a loop counts as its result alone."""

    def function(x):
        def body(i, y):
            return i + 1, tf.cumsum(tf.cumsum(tf.cumsum(y)))

        return tf.while_loop(lambda i, y: i < 5, body, (0, tf.cumsum(x)))[1]

    # Of a turn: what it was given, and two of the three in a row.
    assert 3 * FLOATS <= peak(function, [N]) <= 4 * FLOATS + SMALL


def test_a_variable_that_is_assigned_while_it_is_used_is_there_twice():
    """Fails if the old value is taken to be gone when the new one is stored, or never goes."""
    variable = tf.Variable(tf.zeros([N]))

    def late_use(x):
        before = variable.read_value()
        variable.assign(tf.cumsum(x))
        return tf.reduce_sum(tf.math.cumprod(before))

    def no_use(x):
        variable.assign_add(x)
        return x

    def change_while_used(x):
        before = variable.read_value()
        variable.assign_add(x)
        return tf.reduce_sum(tf.math.cumprod(before))

    def train_while_used(x):
        before = variable.read_value()
        tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=1.0, delta=x)
        return tf.reduce_sum(tf.math.cumprod(before))

    def train(x):
        tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=1.0, delta=x)
        return tf.reduce_sum(variable)

    def again_and_again(x):
        for _ in range(5):
            variable.assign(tf.cumsum(variable.read_value()))
        return x

    assert near(2 * FLOATS)(peak(late_use, [N]))
    assert peak(no_use, [N]) <= SMALL
    assert near(2 * FLOATS)(peak(change_while_used, [N]))
    assert near(2 * FLOATS)(peak(train_while_used, [N]))
    assert peak(train, [N]) <= SMALL
    # The next value, and not all that there were. The one before is the variable's own.
    assert near(FLOATS)(peak(again_and_again, [N]))


def test_kinds_follow_from_what_is_done_with_values():
    """Fails if a gradient counts as an activation, or a weight's copy as either."""
    weight = tf.Variable(tf.zeros([N, N]))

    def step(x):
        with tf.GradientTape() as tape:
            half = tf.cast(weight, tf.float16)
            y = tf.matmul(tf.cast(x, tf.float16), half)
            loss = tf.reduce_sum(tf.square(y))
        gradient = tape.gradient(loss, weight)
        weight.assign_sub(0.5 * gradient)
        return loss

    graph = tf.function(step, autograph=False).get_concrete_function(tf.TensorSpec([8, N])).graph
    ops = ProgramOps(graph)
    handle = ops.inputs[[x.dtype for x in graph.inputs].index(tf.resource)]
    kinds = kinds_of_values(ops, [ops.inputs[0]], {handle})
    found = {
        (work.kind, kinds[work.outputs[0]])
        for work in ops.works
        if work.outputs and ops.sizes[work.outputs[0]] >= 2 * N * N
    }
    assert ("Cast", "other") in found
    assert ("MatMul", "gradients") in found
    assert ("Cast", "gradients") in found
    assert "activations" not in {kind for _, kind in found}
