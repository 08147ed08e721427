"""What workers compare of a script before `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.strategies.keras_patches.script_facts import data_facts, model_facts

pytestmark = pytest.mark.fast


class Items(keras.utils.PyDataset):
    @property
    def num_batches(self):
        return 7


def rows(count):
    return np.zeros((count, 2), "float32")


def dataset(count):
    return tf.data.Dataset.from_tensor_slices(rows(count)).batch(2)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, {"x": "none"}),
        (rows(5), {"x, rows": "5", "x, shape and dtype of a row": "[2] float32"}),
        (tf.zeros([4, 3]), {"x, rows": "4", "x, shape and dtype of a row": "[3] float32"}),
        (({"a": rows(5)}, None), {"x[0]['a'], rows": "5", "x[1]": "none"}),
        ([[0.0]] * 99, {"x": "list"}),
        ((i for i in ()), {"x": "generator"}),
        (Items(), {"x": "Items of 7 batches"}),
    ],
)
def test_data(data, expected):
    """Fails if the number of rows of some kind of data is not compared, or data are read."""
    assert expected.items() <= data_facts("x", data).items()


def test_datasets():
    """Fails if datasets of unlike lengths or elements are taken for the same."""
    assert data_facts("x", dataset(4)) == data_facts("x", dataset(4))
    assert data_facts("x", dataset(4)) != data_facts("x", dataset(6))
    assert data_facts("x", dataset(4)) != data_facts("x", dataset(4).map(lambda x: x[:, :1]))
    unknown = data_facts("x", dataset(4).filter(lambda x: True))["x"]
    assert "an unknown number of batches" in unknown


class WithoutConfig(keras.layers.Layer):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def call(self, x):
        return x


def build(optimizer="sgd", activation="relu", more=()):
    model = keras.Sequential([keras.layers.Dense(3, activation), WithoutConfig(2), *more])
    model.compile(optimizer, "mse")
    return model


def test_models():
    """Fails if two models of one script differ, by names that count layers or by addresses, or if
    an optimizer, its rate, an activation or a layer is not compared."""
    first = model_facts(build())
    assert model_facts(build()) == first
    assert first["optimizer"] == "SGD"
    others = {
        "optimizer": build("adam"),
        "optimizer (SGD), learning_rate": build(keras.optimizers.SGD(0.5)),
        "layer 0 (Dense), activation": build(activation="tanh"),
        "layer 2": build(more=[keras.layers.Dropout(0.5)]),
    }
    for name, model in others.items():
        assert model_facts(model).get(name) != first.get(name), name
