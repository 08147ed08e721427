"""Programs that are cut at their collectives, where the devices of a process share a memory.

That they train the weights of one device is held by every test on a `data` axis.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import collectives, devices
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy

pytestmark = [pytest.mark.fast, pytest.mark.graph_optimizer]

RANKS = 4


@pytest.fixture(scope="module")
def strategy():
    return MeshStrategy(Mesh(data=RANKS, devices=devices.visible_devices()[:RANKS]))


def _run(strategy, function):
    """Results of all ranks, and the types of the collective ops that are left."""
    step = tf.function(
        lambda: strategy.experimental_local_results(strategy.run(function)), autograph=False
    )
    graph = step.get_concrete_function().graph
    called = {op.get_attr("f").name for op in graph.get_operations() if "Call" in op.type}
    left = {
        node.op
        for function in graph.as_graph_def().library.function
        if function.signature.name in called
        for node in function.node_def
        if node.op.startswith("Collective")
    }
    return np.stack([x.numpy() for x in step()]), left


def _mine():
    """Eight numbers that tell ranks and places apart."""
    return 10.0 * tf.cast(collectives.axis_index("data"), tf.float32) + tf.range(8.0)


ALL = np.stack([10.0 * rank + np.arange(8.0) for rank in range(RANKS)])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: collectives.all_reduce(x, "data"), [ALL.sum(0)] * RANKS),
        (lambda x: collectives.all_reduce(x, "data", op="max"), [ALL.max(0)] * RANKS),
        (lambda x: collectives.all_reduce(x, "data", op="min"), [ALL.min(0)] * RANKS),
        (lambda x: collectives.all_gather(x, "data"), [ALL.reshape(-1)] * RANKS),
        (lambda x: collectives.reduce_scatter(x, "data"), ALL.sum(0).reshape(RANKS, 2)),
        (
            lambda x: collectives.all_to_all(x, "data", 0, 0),
            ALL.reshape(RANKS, RANKS, 2).transpose(1, 0, 2).reshape(RANKS, 8),
        ),
    ],
)
def test_every_collective_is_edges(strategy, function, expected):
    """Fails if a rank gets another one's part, or if collective ops are still run."""
    results, left = _run(strategy, lambda: function(_mine()))
    np.testing.assert_array_equal(results, expected)
    assert not left


def test_one_after_the_other_with_state(strategy):
    """Fails if what is written after a collective is read before it is, or a phase twice."""
    with strategy.scope():
        total = tf.Variable(1.0)

    def function():
        rank = tf.cast(collectives.axis_index("data"), tf.float32)
        before = collectives.all_reduce(total * rank, "data")
        total.assign(before + 1.0)
        return collectives.all_gather((total.read_value() + rank)[tf.newaxis], "data")

    results, left = _run(strategy, function)
    np.testing.assert_array_equal(results, [[7.0, 8.0, 9.0, 10.0]] * RANKS)
    assert not left


def test_constants_and_inputs_are_sent_and_returned(strategy):
    """Fails if what no op of the program computes is not found between its phases."""

    def function():
        one = tf.constant(1.0)
        return tf.stack([collectives.all_reduce(one, "data"), one])

    results, _ = _run(strategy, function)
    np.testing.assert_array_equal(results, [[RANKS, 1.0]] * RANKS)


def _in_a_loop():
    return tf.while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, collectives.all_reduce(x, "data")), (0, _mine())
    )[1]


def _in_a_row():
    x = _mine()
    for _ in range(9):
        x = collectives.all_reduce(x, "data") / RANKS
    return x


@pytest.mark.parametrize(
    ("function", "expected"), [(_in_a_loop, 16 * ALL.sum(0)), (_in_a_row, ALL.mean(0))]
)
def test_what_cannot_be_cut_runs_its_collectives(strategy, function, expected):
    """Fails if a program that communicates in a loop, or again and again, is cut or refused."""
    results, left = _run(strategy, function)
    np.testing.assert_allclose(results, [expected] * RANKS, rtol=1e-6)
    assert left or function is _in_a_loop


def test_sums_take_the_memory_of_gradients(strategy):
    """Fails if anything but its sum keeps a gradient, for then all gradients of all devices and
    their sums are there at a time."""
    with strategy.scope():
        layer = keras.layers.Dense(3)
        layer.build((None, 2))
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(layer.trainable_variables)

    def function():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(tf.ones([4, 2])))
        optimizer.apply(tape.gradient(loss, [layer.kernel, layer.bias]))

    step = tf.function(lambda: strategy.run(function), autograph=False)
    graph = step.get_concrete_function().graph
    sums = [op for op in graph.get_operations() if op.type == "AddN"]
    assert len(sums) == 2
    for op in sums:
        assert len(op.inputs) == RANKS
        assert [x.consumers() for x in op.inputs] == [[op]] * RANKS
