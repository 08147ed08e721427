"""Steps of Keras with loops and conditions, on several devices and on one."""

import keras
import lanes
import numpy as np
import pytest
import references
import tensorflow as tf
from keras import layers

from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy

RNG = np.random.default_rng(0)
# The last of three batches has three rows.
X, Y = RNG.normal(size=(11, 6)), RNG.normal(size=(11, 2))


@pytest.fixture(autouse=True)
def _float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


class Own(keras.Model):
    """A model with a step of its own."""

    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(4, activation="tanh")
        self.head = layers.Dense(2)
        self.noise = layers.Dropout(0.5, seed=3)

    def build(self, shape):
        self.hidden.build(shape)
        self.head.build((None, 4))
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, x, training=False):
        return self.head(self.noise(self.hidden(x), training=training))

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            limit = tf.constant(1e9, loss.dtype)
            tf.debugging.assert_less(loss, limit, [x])
        return loss, tape.gradient(loss, self.trainable_variables)


class EverySecond(Own):
    """Updates in every second step."""

    def train_step(self, data):
        x, y = data
        loss, gradients = self.gradients(x, y)
        self.count.assign_add(1.0)

        def update():
            self.optimizer.apply(gradients, self.trainable_variables)
            return tf.constant(True)

        tf.cond(tf.equal(self.count.value % 2.0, 0.0), update, lambda: tf.constant(False))
        return {"loss": loss}


class ManyUpdates(Own):
    """Updates in each iteration of a loop, which counts rows too."""

    def train_step(self, data):
        x, y = data

        def body(i, loss):
            loss, gradients = self.gradients(x, y)
            self.count.assign_add(tf.reduce_sum(x))
            self.optimizer.apply(gradients, self.trainable_variables)
            return i + 1, loss

        start = (0, tf.zeros([], tf.float64))
        return {"loss": tf.while_loop(lambda i, loss: i < 3, body, start)[1]}


class Accumulated(Own):
    """Adds up gradients in a loop and updates once."""

    def train_step(self, data):
        x, y = data
        weights = self.trainable_variables

        def body(i, loss, *totals):
            loss, gradients = self.gradients(x * tf.cast(i + 1, x.dtype), y)
            return i + 1, loss, *(a + b for a, b in zip(totals, gradients, strict=True))

        start = (0, tf.zeros([], tf.float64), *(tf.zeros_like(w) for w in weights))
        _, loss, *totals = tf.while_loop(lambda i, *_: i < 3, body, start)
        self.optimizer.apply(totals, weights)
        return {"loss": loss}


def recurrent():
    shared = {"return_sequences": True}
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Reshape((3, 2)),
            layers.LSTM(4, dropout=0.3, seed=3, **shared),
            layers.SimpleRNN(3, **shared),
            layers.GRU(3),
            layers.Dense(2),
        ]
    )


def masked():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Lambda(lambda x: tf.cast(tf.abs(x) * 3.0, tf.int32)),
            layers.Embedding(20, 5, mask_zero=True),
            layers.Bidirectional(layers.GRU(3)),
            layers.Dense(2),
        ]
    )


MODELS = {
    "accumulated": Accumulated,
    "every second": EverySecond,
    "many updates": ManyUpdates,
    "masked": masked,
    "recurrent": recurrent,
}


def trained(name, **axes):
    keras.utils.set_random_seed(1)
    strategy = MeshStrategy(Mesh(**axes)) if axes else tf.distribute.get_strategy()
    with strategy.scope():
        model = MODELS[name]()
        model.build((None, 6))
        model.compile(keras.optimizers.SGD(0.02, momentum=0.9), "mse", jit_compile=False)
    history = model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    return [*model.get_weights(), history["loss"], model.predict(X, batch_size=4, verbose=0)]


CELLS = [
    ("accumulated", {"data": 3}),
    ("every second", {"data": 2}),
    ("every second", {"data": 2, "fsdp": 2}),
    ("many updates", {"data": 3}),
    ("recurrent", {"data": 2}),
    ("recurrent", {"data": 3}),
    ("recurrent", {"fsdp": 2}),
    ("masked", {"data": 2}),
]


@references.shared
def one_device(name):
    return trained(name)


@pytest.mark.parametrize(
    ("name", "axes"),
    lanes.usual(CELLS, *CELLS[:6]),
)
def test_steps_with_loops_and_conditions_train_as_on_one_device(name, axes):
    # Fails if an update in a branch or a loop is not found, a rank's gradient is taken for that of
    # all, or the state of a recurrent layer is that of other rows.
    for got, expected in zip(trained(name, **axes), one_device(name), strict=True):
        np.testing.assert_allclose(got, expected, 1e-12, 1e-13)
