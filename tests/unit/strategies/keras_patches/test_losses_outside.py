"""Losses that are computed in a scope, and outside of a step."""

import keras
import numpy as np
import pytest
from small_strategies import strategy_of

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("mesh", ["data2", "fsdp2-tensor2"])
def test_a_loss_is_that_of_one_device(mesh):
    """Fails if it is divided by the number of replicas, none of which computes it."""
    y, p = np.array([[1.0], [3.0]]), np.array([[2.0], [1.0]])
    with strategy_of(mesh).scope():
        assert float(keras.losses.MeanSquaredError()(y, p)) == 2.5
