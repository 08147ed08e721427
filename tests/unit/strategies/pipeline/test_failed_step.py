"""A step of a pipeline that fails: its error, and the step after it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy


class Check(keras.layers.Layer):
    """Refuses large numbers."""

    def call(self, x):
        with tf.control_dependencies([tf.debugging.assert_less(x, 1e3, message="bad row")]):
            return tf.identity(x)


def test_the_step_after_one_that_failed_sees_its_own_rows():
    """Fails if the error of one stage is masked by what another one waits for, or if microbatches
    of the failed step that nobody has taken are taken by the next one."""
    keras.utils.set_random_seed(0)
    with MeshStrategy(Mesh(pipe=2), num_microbatches=4, schedule="gpipe").scope():
        layers = [keras.layers.Dense(4, kernel_initializer="identity") for _ in range(3)]
        layers.insert(2, Check())
        model = keras.Sequential([keras.Input((4,)), *layers])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.random.default_rng(0).random((8, 4))
    expected = model.train_on_batch(x, x[::-1])
    for row in (2, 7, 4):
        bad = x + 1.0
        bad[row] = 1e4
        with pytest.raises(tf.errors.InvalidArgumentError, match="bad row"):
            model.train_on_batch(bad, x)
        # `train_on_batch` returns the mean of all batches until metrics are reset.
        model.reset_metrics()
        np.testing.assert_allclose(model.train_on_batch(x, x[::-1]), expected)
