"""Functions that are cut out of a graph compute what the graph computes."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from llmos_tf.graph.subgraph import GraphCuts

pytestmark = pytest.mark.fast

# Op on two earlier values.
BINARY = (tf.add, tf.subtract, tf.multiply, lambda x, y: tf.tanh(x) - y, lambda x, y: x)


@st.composite
def chains(draw):
    """Ops, each on two values from before, two inputs first; and where the chain is cut in two."""
    count = draw(st.integers(2, 12))
    ops = [
        (
            draw(st.integers(0, len(BINARY) - 1)),
            draw(st.integers(0, i + 1)),
            draw(st.integers(0, i + 1)),
        )
        for i in range(count)
    ]
    return ops, draw(st.integers(1, count))


def graph_of(ops):
    """The graph of a chain, with its inputs and values."""
    with tf.Graph().as_default() as graph:
        values = [tf.compat.v1.placeholder(tf.float64, [3]) for _ in range(2)]
        for op, x, y in ops:
            values.append(BINARY[op](values[x], values[y]))
    return graph, values


@given(chains())
def test_two_functions_are_the_graph(chain):
    """Fails if a function lacks an op, takes an op twice, or takes or returns another tensor."""
    ops, where = chain
    graph, values = graph_of(ops)
    expected = [np.array([1.0, -2.0, 0.5]), np.array([0.3, 4.0, -1.0])]
    for op, x, y in ops:
        expected.append(np.asarray(BINARY[op](expected[x], expected[y])))
    cuts = GraphCuts(graph)
    first = cuts.ancestors(values[: where + 2])
    # What is left to be done for the last value, with the first function's results at hand.
    rest = cuts.ancestors(values[-1:], without=first)
    assert not first & rest
    handed_on = [x for x in cuts.inputs_of(rest) if x.op.name in first]
    known = {x.ref(): tf.constant(y) for x, y in zip(values[:2], expected, strict=False)}
    for names, fetches in ((first, handed_on + values[: where + 2]), (rest, values[-1:])):
        function = cuts.cut(names, fetches)
        assert {x.ref() for x in function.feeds} <= known.keys()
        known.update(zip([x.ref() for x in fetches], function(known), strict=True))
    np.testing.assert_allclose(known[values[-1].ref()], expected[-1], rtol=1e-12)


def test_what_is_given_is_not_computed():
    """Fails if an op before a given tensor is cut out too, as a message from another stage is."""
    graph, values = graph_of([(0, 0, 1), (2, 2, 2), (1, 3, 0)])
    cuts = GraphCuts(graph)
    names = cuts.ancestors([values[-1]], given=[values[3]])
    assert names == {values[-1].op.name}
    function = cuts.cut(names, [values[-1]])
    known = {values[3].ref(): tf.ones([3], tf.float64), values[0].ref(): tf.zeros([3], tf.float64)}
    np.testing.assert_array_equal(function(known)[0], np.ones(3))


def test_gradients_are_cut_from_what_they_are_placed_with():
    """Fails if a gradient's op, which TensorFlow puts beside the op that it belongs to, cannot be
    imported without that."""
    with tf.Graph().as_default() as graph:
        table = tf.compat.v1.placeholder(tf.float32, [5, 2])
        rows = tf.gather(table, [1, 1, 3])
        (gradient,) = tf.gradients(rows * rows, table)
        dense = tf.convert_to_tensor(gradient)
    cuts = GraphCuts(graph)
    forward = cuts.ancestors([rows])
    function = cuts.cut(cuts.ancestors([dense], without=forward), [dense])
    known = {x.ref(): tf.ones(x.shape, x.dtype) for x in function.feeds if x.dtype != tf.int32}
    indices = {x.ref(): tf.constant([1, 1, 3]) for x in function.feeds if x.shape == [3]}
    result = function({**known, **indices})[0]
    np.testing.assert_array_equal(result, [[0, 0], [4, 4], [0, 0], [2, 2], [0, 0]])


@pytest.mark.parametrize("stateful", [True, False])
def test_what_an_op_waits_for(stateful):
    """Fails if what an op without state waits for, such as an assertion, is left out, or if the
    order of ops with state carries one of them into the function of another."""
    with tf.Graph().as_default() as graph:
        x = tf.constant([2])

        def op():
            return tf.raw_ops.RandomUniform(shape=x, dtype=tf.float32) if stateful else x + 1

        before = op()
        with tf.control_dependencies([before]):
            after = op()
    names = GraphCuts(graph).ancestors([after])
    assert (before.op.name in names) == (not stateful)


def test_what_is_needed():
    """Fails if an op for which nobody asks is copied for each device, or if one that changes a
    variable is left out, as a step's update, of which nothing is returned, would be."""
    variable = tf.Variable([1.0, 2.0])

    @tf.function(autograph=False)
    def function(x):
        tf.sin(x, name="unasked")
        variable.assign_add(tf.cos(x, name="added"))

    graph = function.get_concrete_function(tf.TensorSpec([2])).graph
    names = GraphCuts(graph).needed()
    assert "added" in names
    assert "unasked" not in names


def test_equal_constants_are_one():
    """Fails if a function has a constant for each op that uses one, if constants of equal bytes and
    other types are taken for each other, or if one that is returned is left out."""
    with tf.Graph().as_default() as graph:
        x = tf.compat.v1.placeholder(tf.float32, [2])
        for _ in range(3):
            x = x * tf.constant([2.0, 3.0])
        ones = [tf.cast(tf.constant([1, 1], dtype), tf.float32) for dtype in (tf.int32, tf.uint32)]
        returned = tf.constant([2.0, 3.0])
        result = x + ones[0] + ones[1]
    cuts = GraphCuts(graph)
    function = cuts.cut(cuts.ancestors([result, returned]), [result, returned])
    types = [op.type for op in function.concrete.graph.get_operations()]
    assert types.count("Const") == 2 + 2
    values = function({function.feeds[0].ref(): tf.ones([2])})
    np.testing.assert_array_equal(values, [[10, 29], [2, 3]])
