"""Layouts of models whose variables are made after their layers' names are gone."""

import keras
import numpy as np
import pytest

from llmos_tf import Mesh
from llmos_tf.sharding import Layout
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
