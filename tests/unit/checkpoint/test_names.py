"""Names: the same for the same code, whatever else the process has made."""

import keras
import numpy as np
import pytest

from llmos_tf.checkpoint import names
from llmos_tf.checkpoint.names import (
    named_model_variables,
    named_optimizer_variables,
    optimizer_kind,
)
from llmos_tf.models import GPT, GPTConfig

pytestmark = pytest.mark.fast


class Nested(keras.Model):
    """Layers with and without names, a model in the model, and a variable without a name."""

    def __init__(self):
        super().__init__()
        self.tower = keras.Sequential([keras.layers.Dense(2), keras.layers.Dense(2)])
        self.block_1 = keras.layers.Dense(2, name="block_1")
        self.block_1_norm = keras.layers.LayerNormalization(name="block_1_norm")
        self.dropout = keras.layers.Dropout(0.1)
        self.scale = keras.Variable(np.ones(2), trainable=True)

    def call(self, x, training=False):
        y = self.block_1_norm(self.block_1(self.tower(x)))
        return self.dropout(y, training=training) * self.scale


def nested():
    model = Nested()
    model(np.ones([1, 2]))
    return model


def functional():
    inputs = keras.Input([2])
    hidden = keras.layers.Dense(3)(inputs)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Dropout(0.5)(hidden)))


def gpt():
    return GPT(
        GPTConfig(
            vocab_size=9, max_positions=4, hidden_size=4, num_heads=2, num_layers=2, dropout=0.1
        )
    )


EXPECTED = {
    nested: [
        "variable",
        "sequential/dense/kernel",
        "sequential/dense_1/kernel",
        "block_1/kernel",
        "block_1_norm/gamma",
        "seed_generator/seed_generator_state",
    ],
    functional: ["dense/kernel", "seed_generator/seed_generator_state", "dense_1/bias"],
    gpt: [
        "token_embedding/table",
        "seed_generator/seed_generator_state",
        "block_0/attention/query_key_value/kernel",
        "block_1/feed_forward/down/bias",
        "seed_generator_6/seed_generator_state",
    ],
}


@pytest.mark.parametrize("make", EXPECTED)
def test_names_do_not_count_other_models(make):
    """Fails if a number of the process, or the model's own name, gets into a name; or if a number
    that is part of a given name, as of a block, is lost."""
    first, second = make(), make()
    found = named_model_variables(first)
    assert [name for name in found if name in EXPECTED[make]] == EXPECTED[make]
    assert list(named_model_variables(second)) == list(found)
    assert [id(v) for v in found.values()] == [id(v) for v in first.variables]


def test_equal_paths_are_told_apart():
    """Fails if one of two variables of the same Keras path is lost."""

    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(2, name="twin")
            self.second = keras.layers.Dense(2, name="twin")

        def call(self, x):
            return self.second(self.first(x))

    model = Twins()
    model(np.ones([1, 2]))
    assert list(named_model_variables(model)) == [
        "twin/kernel",
        "twin/bias",
        "twin/kernel#2",
        "twin/bias#2",
    ]


def test_slots_are_named_after_their_weight():
    """Fails if a slot of `block_1_norm` is taken for one of `block_1`, or the process's numbers
    of models and optimizers get into a name."""
    listed = []
    for _ in range(2):
        model = nested()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
        listed.append(list(named_optimizer_variables(optimizer, named_model_variables(model))))
    assert listed[0] == listed[1]
    assert listed[0][:3] == ["00000/iteration", "00001/learning_rate", "00002/variable/momentum"]
    assert "00009/block_1_norm/gamma/momentum" in listed[0]


def test_kinds_of_optimizers():
    """Fails if the optimizer inside a loss scale is not told."""
    assert optimizer_kind(keras.optimizers.SGD()) == "SGD"
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW())
    assert optimizer_kind(scaled) == "LossScaleOptimizer(AdamW)"


def test_example():
    """Fails if the docstring no longer says what happens."""
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4)], name="tower")
    assert list(names.named_model_variables(model)) == ["dense/kernel", "dense/bias"]
