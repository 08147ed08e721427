"""Plain Keras scripts train under our strategies with the weights of one device, in float64.

Sums in another order differ by 1e-16 relative, and Adam magnifies that to some 1e-13 at most; any
wrong divisor, mask, statistic or missing reduce is far above 1e-9.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.strategies import DataParallelStrategy, ZeroStrategy

layers = keras.layers
TOLERANCE = 1e-9
# The last batch of 8 has 4 rows.
ROWS = 36
RNG = np.random.default_rng(0)
POINTS, LABELS = RNG.normal(size=(ROWS, 12)), RNG.integers(0, 4, ROWS)
IMAGES = RNG.normal(size=(ROWS, 8, 8, 3))
TOKENS = RNG.integers(0, 20, (ROWS, 6))
WEIGHTS = RNG.random(ROWS)


def mlp_script():
    """Sequential, built at the first batch; clipping, sample weights, metrics, validation."""
    model = keras.Sequential([layers.Dense(16, "relu"), layers.Dense(4, "softmax")])
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=["accuracy"],
    )
    history = model.fit(
        POINTS,
        LABELS,
        sample_weight=WEIGHTS,
        batch_size=8,
        shuffle=False,
        verbose=0,
        validation_data=(POINTS[:13], LABELS[:13]),
    )
    return model, history, POINTS


def cnn_script():
    """Functional, with synchronized batch normalization; a tf.data dataset and a regularizer."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", kernel_regularizer="l2")(inputs)
    x = layers.BatchNormalization(synchronized=True)(x)
    x = layers.Activation("relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(5, 3)(x)
    x = layers.BatchNormalization(synchronized=True)(x)
    outputs = layers.Dense(4)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["sparse_categorical_accuracy"])
    dataset = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(8)
    return model, model.fit(dataset, verbose=0), IMAGES


class Transformer(keras.Model):
    """A subclassed model of plain Keras layers, built by its first call."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(20, 8)
        self.attention = layers.MultiHeadAttention(2, 4)
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.up, self.down = layers.Dense(16, "gelu"), layers.Dense(8)
        self.pool, self.head = layers.GlobalAveragePooling1D(), layers.Dense(4)

    def call(self, tokens):
        x = self.embedding(tokens)
        y = self.norms[0](x)
        x += self.attention(y, y, use_causal_mask=True)
        x += self.down(self.up(self.norms[1](x)))
        return self.head(self.pool(x))


def transformer_script():
    """Subclassed, with a learning-rate schedule, weight decay, class weights."""
    model = Transformer()
    schedule = keras.optimizers.schedules.CosineDecay(0.01, 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(schedule), loss, metrics=["accuracy"])
    history = model.fit(
        TOKENS,
        LABELS,
        batch_size=8,
        shuffle=False,
        verbose=0,
        class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0},
    )
    return model, history, TOKENS


SCRIPTS = {"mlp": mlp_script, "cnn": cnn_script, "transformer": transformer_script}
STRATEGIES = {
    "data2": lambda: DataParallelStrategy(["CPU:0", "CPU:1"]),
    "data4": lambda: DataParallelStrategy([f"CPU:{i}" for i in range(4)]),
    "zero3-2": lambda: ZeroStrategy(3, ["CPU:0", "CPU:1"]),
    "zero3-4": lambda: ZeroStrategy(3, [f"CPU:{i}" for i in range(4)]),
}


def run(script):
    """Weights, logs of fit, of evaluate, and predictions."""
    keras.utils.set_random_seed(0)
    model, history, x = SCRIPTS[script]()
    logs = {name: values[-1] for name, values in history.history.items()}
    scores = model.evaluate(x[:13], LABELS[:13], batch_size=8, verbose=0, return_dict=True)
    logs |= {f"evaluate_{name}": value for name, value in scores.items()}
    return model.get_weights(), logs, model.predict(x[:13], batch_size=8, verbose=0)


@functools.cache
def one_device(script):
    return run(script)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_of_one_device(float64, script, strategy):
    """Fails if a script that nobody changed trains, reports or predicts anything else."""
    expected = one_device(script)
    with STRATEGIES[strategy]().scope():
        weights, logs, predictions = run(script)
    assert len(weights) == len(expected[0]) > 3
    for actual, wanted in zip(weights, expected[0], strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE)
    assert set(logs) == set(expected[1])
    for name, value in logs.items():
        # Keras keeps metrics in float32 however precise the model is.
        assert value == pytest.approx(expected[1][name], abs=1e-6), name
    np.testing.assert_allclose(predictions, expected[2], rtol=0, atol=TOLERANCE)
