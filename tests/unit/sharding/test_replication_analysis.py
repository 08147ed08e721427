"""What the graph of a program says of a tensor: along which axes ranks differ in it."""

import keras
import pytest
import tensorflow as tf

from llmos_tf import collectives, devices
from llmos_tf.collectives import batch
from llmos_tf.mesh import Mesh
from llmos_tf.sharding.replication_analysis import varying_axes
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

BOTH = {"data", "fsdp"}


class Model:
    """Variables of all kinds."""

    def __init__(self):
        self.weight = keras.Variable([1.0, 2.0, 3.0], name="weight")
        self.mean = keras.metrics.Mean()
        self.seeds = keras.random.SeedGenerator(1)

    @property
    def stored(self):
        return self.weight.value


def in_a_function(x):
    return tf.function(lambda y: collectives.all_reduce(tf.reduce_sum(y * x), BOTH))(x)


def in_a_branch(x):
    return tf.cond(x[0] > 0, lambda: x, lambda: -x)


def in_the_order_of_gradients(x):
    with current_program().having(reduces_gradients=True):
        return collectives.all_reduce(x, "data")


CASES = {
    "rows": (lambda m, x: x, BOTH),
    "number": (lambda m, x: 1.0, set()),
    "constant": (lambda m, x: tf.constant(1.0) + 2.0, set()),
    "loss": (lambda m, x: tf.sqrt(batch.total(tf.reduce_sum(x)) + 1.0), set()),
    "own sum beside a loss": (lambda m, x: batch.total(tf.reduce_sum(x)) + x[0], BOTH),
    "sum along data": (lambda m, x: collectives.all_reduce(x, "data"), {"fsdp"}),
    "summed gradient": (lambda m, x: in_the_order_of_gradients(x), {"fsdp"}),
    "sum along fsdp": (lambda m, x: collectives.all_reduce(x, "fsdp"), {"data"}),
    "gathered": (lambda m, x: collectives.all_gather(x, BOTH), set()),
    "scattered": (lambda m, x: collectives.reduce_scatter(x, "data"), BOTH),
    "coordinate": (lambda m, x: collectives.axis_index("data"), BOTH),
    "part of a weight": (lambda m, x: m.stored.part(), {"fsdp"}),
    "weight": (lambda m, x: m.weight * 2.0, set()),
    "weight and rows": (lambda m, x: m.weight * x[0], BOTH),
    "metric": (lambda m, x: m.mean.total.value.values[0].value(), BOTH),
    "seed": (lambda m, x: m.seeds.state * 1, BOTH),
    "random": (lambda m, x: tf.random.uniform([2]), BOTH),
    "branch on rows": (lambda m, x: in_a_branch(x), BOTH),
    "result of a function": (lambda m, x: in_a_function(x), BOTH),
}


@pytest.fixture(scope="module")
def strategy():
    return MeshStrategy(Mesh(data=2, fsdp=2, devices=devices.visible_devices()[:4]))


@pytest.mark.parametrize("name", CASES)
def test_axes_along_which_ranks_differ(strategy, name):
    """Fails if what differs is taken for the same, of which a sum would lose all ranks but one, or
    a loss for what differs, which would be counted once for each rank."""
    tensor_of, expected = CASES[name]
    with strategy.scope():
        model = Model()
    found = []

    def program(x):
        tensor = tensor_of(model, x)
        found.append(varying_axes(current_program(), tensor))
        return tf.zeros([])

    @tf.function(autograph=False)
    def step(x):
        return strategy.run(program, (x,))

    step(tf.ones([2]))
    assert found[-1] == expected


def test_what_a_function_captures(strategy):
    """Fails if a tensor that a nested function has captured is taken for an argument of it."""
    found = []

    def program(x):
        loss = batch.total(tf.reduce_sum(x))

        @tf.function(autograph=False)
        def inner(y):
            found.append([varying_axes(current_program(), t) for t in (loss * 2.0, y, x[0])])
            return y

        return inner(x)

    strategy.run(program, (tf.ones([2]),))
    assert found[-1] == [set(), BOTH, BOTH]
