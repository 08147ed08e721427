"""Shapes inside of functions and of the elements of tensor lists."""

import pytest
import tensorflow as tf
from unit.partition.running import plan_of

from llmos_tf.partition.graph.flat_graph import FlatGraph

pytestmark = pytest.mark.fast


def flat(function, *shapes):
    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    return FlatGraph(concrete.graph, [True] * len(shapes))


def nodes(graph):
    for node in graph.nodes:
        yield node
        for inner in node.functions:
            yield from nodes(inner)


def described(value):
    """Lengths of a value, where R is the number of rows; None where one is not known."""
    if value.dims is None:
        return None
    return [
        None if dim is None else dim.length or (f"{dim.row_factor}R" if dim.row_factor else "?")
        for dim in value.dims
    ]


def stored(x):
    array = tf.TensorArray(x.dtype, size=tf.shape(x)[1])

    def body(i, array):
        return i + 1, array.write(i, tf.concat([x[:, :2], x[:, :1]], 1))

    return tf.while_loop(lambda i, a: i < tf.shape(x)[1], body, (0, array))[1].stack()


def test_elements_are_followed_through_a_loop():
    # Fails if what a loop stores is not known where it is read.
    graph = flat(stored, [None, 4])
    assert described(graph.outputs[0]) == [4, "1R", 3]


def test_a_length_that_is_not_known_is_that_of_the_list():
    # Fails if the number of elements is lost: what is stacked could not be reshaped.
    graph = flat(stored, [None, None])
    assert described(graph.outputs[0])[1:] == ["1R", 3]
    assert described(graph.outputs[0])[0] == "?"


def test_a_variable_without_one_shape_has_no_lengths():
    # Fails if the shape before the first iteration is taken for all.
    def growing(x):
        def body(i, y):
            return i + 1, tf.concat([y, y[:1]], 0)

        shapes = (tf.TensorShape([]), tf.TensorShape([None, 4]))
        return tf.while_loop(lambda i, y: i < 2, body, (0, x), shapes)[1]

    assert described(flat(growing, [None, 4]).outputs[0]) == [None, 4]


def test_branches_agree_about_shapes():
    # Fails if the shape of one branch is taken for that of a condition.
    def chosen(x):
        return tf.cond(x[0, 0] > 0.0, lambda: x[:, :2], lambda: x[:, 1:])

    assert described(flat(chosen, [None, 4]).outputs[0]) == ["1R", None]


def test_shapes_that_a_gradient_stores_are_known_where_it_reads_them():
    # Fails if the gradient of a loop does not know what its sums are reduced to.
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            body = lambda i, y: (i + 1, y * x + tf.reduce_mean(y, 1, keepdims=True))  # noqa: E731
            y = tf.while_loop(lambda i, y: i < 3, body, (0, x))[1]
        return tape.gradient(y, x)

    graph = flat(gradient, [None, 4])
    sums = [node for node in nodes(graph) if node.type == "Sum"]
    assert sums
    assert all(None not in described(node.outputs[0]) for node in sums)
    assert described(graph.outputs[0]) == ["1R", 4]


def test_ops_that_a_gradient_put_in_are_sorted():
    # Fails if a list that is made after the loop that it is put into is not found.
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, tf.sin(y)), (0, x))[1]
        return tape.gradient(y, x)

    made = set()
    for node in flat(gradient, [None, 4]).nodes:
        assert all(value in made for value in node.inputs)
        made.update(node.outputs)


@pytest.mark.parametrize("function", [tf.py_function, tf.numpy_function])
def test_python_in_a_step_is_refused(function):
    # Fails if each rank calls Python with its rows, or waits for one that does.
    with pytest.raises(ValueError, match=r"PyFunc.*input pipeline"):
        plan_of(lambda x: function(lambda x: x, [x], tf.float64), [None, 4])
