"""Updates of parts: what an optimizer sees of a variable that is cut for it."""

import contextlib

import keras
import numpy as np
import pytest

from llmos_tf import devices
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy

FOUR = {"zero1": ({"data": 4}, 1), "zero3": ({"fsdp": 4}, 3), "both": ({"data": 2, "fsdp": 2}, 1)}


@pytest.mark.parametrize("name", FOUR)
def test_a_part_that_is_as_long_as_a_row(float64, name):
    """Fails if an optimizer is told the shape of the whole: a quarter of a (4, 6) matrix has six
    elements, and Keras's `add` takes six beside a matrix for a bias, which Ftrl's update runs into.
    """
    axes, stage = FOUR[name]
    mesh = Mesh(**axes, devices=devices.visible_devices()[:4])

    def trained(scope):
        keras.utils.set_random_seed(0)
        with scope:
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(6)])
            model.compile(keras.optimizers.Ftrl(0.1), "mse")
        x = np.random.default_rng(0).normal(size=(8, 4))
        model.fit(x, np.ones((8, 6)), batch_size=4, epochs=2, shuffle=False, verbose=0)
        return model.get_weights()

    weights = trained(MeshStrategy(mesh, zero_stage=stage).scope())
    for one, other in zip(weights, trained(contextlib.nullcontext()), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
