"""Layouts of models whose variables get their values after their layers' names are gone."""

import keras
import numpy as np
import pytest
from keras import layers

from llmos_tf import Mesh
from llmos_tf.sharding import Layout, ShardedVariable
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast


class Outer(keras.Model):
    def __init__(self):
        super().__init__(name="outer")
        self.inner = keras.Sequential([keras.layers.Dense(4, name="dense")], name="inner")

    def call(self, x):
        return self.inner(x)


def test_a_model_that_its_first_batch_builds_has_layouts():
    """Fails if a variable that Keras initializes after a trace is looked up without its path."""
    rules = {"outer/inner/dense/kernel": (None, "tensor")}
    with MeshStrategy(Mesh(tensor=2), layout_map=rules).scope():
        model = Outer()
        model.compile("sgd", "mse")
    model.fit(np.ones((2, 3)), np.ones((2, 4)), verbose=0)
    kernel, bias = model.weights
    assert kernel.value.path == kernel.path == "outer/inner/dense/kernel"
    assert kernel.value.layout == Layout((None, "tensor"))
    assert bias.value.layout.is_whole


class Block(layers.Layer):
    """As the transformer blocks of the examples of keras.io: without `build`."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x)


class BuildsLayer(layers.Layer):
    """Its layer exists since `build`, and has weights since `call`."""

    def build(self, input_shape):
        self.dense = layers.Dense(4)
        self.scale = self.add_weight(shape=(4,), name="scale")

    def call(self, x):
        return self.dense(x) * self.scale


def functional(*stack, shape=(4,)):
    x = inputs = keras.Input(shape)
    for layer in stack:
        x = layer(x)
    return keras.Model(inputs, x)


def model_of_blocks():
    shared = layers.Dense(4, name="shared")
    stack = [
        Block(Block(Block(layers.Dense(4)))),
        Block(keras.Sequential([layers.Dense(4), Block(layers.Dense(4))])),
        Block(functional(Block(layers.Dense(4)))),
        Block(layers.Dense(4, name="same"), name="same"),
        Block(shared),
        Block(shared),
        BuildsLayer(),
        layers.BatchNormalization(),
    ]
    return functional(*stack)


def model_of_wrappers():
    stack = [
        Block(layers.TimeDistributed(layers.Dense(4))),
        Block(layers.Bidirectional(layers.LSTM(2, return_sequences=True))),
        Block(layers.RNN([layers.LSTMCell(2), layers.GRUCell(3)])),
    ]
    return functional(*stack, shape=(3, 4))


@pytest.mark.parametrize("make", [model_of_blocks, model_of_wrappers])
def test_a_variable_is_created_under_the_path_that_it_shows(make):
    """Fails if a layer around adds its name again, so that a rule of `variable.path` matches
    nothing; the optimizer is built outside the scope, its counters are created anew."""
    strategy = MeshStrategy(Mesh(data=2))
    with strategy.scope():
        model = make()
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    stored = {v.path: v.value.path for v in variables if isinstance(v.value, ShardedVariable)}
    assert len(stored) > 6
    assert list(stored) == list(stored.values())


def test_a_rule_of_weights_leaves_optimizer_state_alone():
    """Fails if a rule is applied to Adafactor's factors, which are named after their kernel and
    have one dimension only."""
    strategy = MeshStrategy(Mesh(tensor=2), layout_map={".*kernel.*": (None, "tensor")})
    with strategy.scope():
        model = functional(layers.Dense(4))
        model.compile("adafactor", "mse")
        model.optimizer.build(model.trainable_variables)
    layouts = {v.path: v.value.layout for v in model.optimizer.variables}
    assert layouts["adafactor/kernel"].is_whole
    assert layouts["adafactor/dense_kernel_velocity"] == Layout((None, "tensor"))
