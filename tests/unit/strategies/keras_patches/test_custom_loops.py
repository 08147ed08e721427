"""A GradientTape outside of strategy.run: what it can do, and where users are sent."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

WAYS = r"llmos_tf\.training\.make_train_step.*strategy\.run"


def make():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    return model, keras.optimizers.SGD(0.1)


def step(model, optimizer):
    x, y = np.ones([4, 3], "float32"), np.zeros([4, 2], "float32")
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
    return model.get_weights()


def test_replicated_weights_train_on_one_device_with_a_warning():
    """Fails if a plain loop trains wrongly, or idle devices are not mentioned."""
    expected = step(*make())
    strategy = MeshStrategy(Mesh(data=2))
    for scope in (contextlib.nullcontext(), strategy.scope()):
        with strategy.scope():
            mine = make()
        warns = pytest.warns(UserWarning, match=f"one device computes the whole batch.*{WAYS}")
        with scope, warns:
            trained = step(*mine)
        for a, b in zip(trained, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
    with MeshStrategy(Mesh()).scope():
        alone = make()
    step(*alone)


@pytest.mark.parametrize("mesh", [Mesh(fsdp=2), Mesh(pipe=2)], ids=str)
def test_sharded_weights_name_the_step_that_trains_them(mesh):
    """Fails if the error is about shapes of shards, which the user has never seen."""
    with MeshStrategy(mesh).scope():
        mine = make()
    # By the tape or, where the weights are not sharded, by the optimizer.
    with pytest.raises((LookupError, ValueError), match=f"outside of strategy.run.*{WAYS}"):
        step(*mine)
