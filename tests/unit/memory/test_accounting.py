"""The report of memory: every byte of every variable once, on the device that holds it."""

import keras
import pytest
import tensorflow as tf

from llmos_tf import Mesh, memory
from llmos_tf.strategies import MeshStrategy, ZeroStrategy

pytestmark = pytest.mark.fast

CPUS = [f"CPU:{i}" for i in range(4)]


def make_model():
    layers = [
        keras.Input([30]),
        keras.layers.Dense(10),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
    ]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.Adam(), "mse")
    return model


# Kernel 300 and bias 10; scale and shift 10 each.
NUM_PARAMETERS = 330


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_part_is_counted_where_it_lies(stage):
    """Fails if full shapes are counted instead of parts, or all parts on one device."""
    strategy = MeshStrategy(Mesh(data=4, devices=CPUS)) if not stage else ZeroStrategy(stage, CPUS)
    with strategy.scope():
        model = make_model()
        model.optimizer.build(model.trainable_variables)
    rows = memory.report(model)
    assert [row["device"].rpartition("device:")[2] for row in rows] == CPUS
    # Four of 10 elements are cut into parts of 3: two elements of padding for each.
    padded = (300 + 3 * 12) // 4
    parameters = padded if stage == 3 else NUM_PARAMETERS
    moments = 2 * (padded if stage else NUM_PARAMETERS)
    for row in rows:
        assert row["parameters"] == 4 * parameters
        # Step count (int64 or int32) and learning rate are scalars beside the moments.
        assert 0 < row["optimizer"] - 4 * moments <= 16
        # Moving mean and variance of 10, the seed's two int64, and the loss's mean: sum and count.
        assert row["other"] == 4 * 20 + 8 * 2 + 4 * 2


def test_what_is_offloaded_is_on_the_host():
    """Fails if it is counted on the device that it is for, or as a row of its own, or of a step
    what the host computes is counted as the device's."""
    model, strategy = None, None
    rows = {}
    for offload in (None, "optimizer", "parameters", "all"):
        strategy = MeshStrategy(Mesh(data=2, devices=CPUS[2:]), offload=offload)
        with strategy.scope():
            model = make_model()
            model.optimizer.build(model.trainable_variables)
        x, y = tf.TensorSpec([2, 30]), tf.TensorSpec([2, 10])
        rows[offload], other = memory.report(model, batch=(x, y))
        assert [row["device"][-5:] for row in (rows[offload], other)] == CPUS[2:]
    weights, state = 4 * NUM_PARAMETERS, rows[None]["optimizer"]
    assert [row["parameters"] for row in rows.values()] == [weights, weights, 0, 0]
    assert [row["optimizer"] for row in rows.values()] == [state, 0, state, 0]
    assert [row["host"] for row in rows.values()] == [0, state, weights, state + weights]
    # Of one group on the device gradients, weights and moments, and what they become; else the
    # change that comes back.
    assert rows[None]["gradients"] > 2 * weights
    assert rows["optimizer"]["gradients"] + rows["optimizer"]["other"] < 2 * weights


def test_one_device_and_errors():
    """Fails if a model without a strategy is not counted, or one without weights is 0 bytes."""
    (row,) = memory.report(make_model())
    assert row["device"].endswith("CPU:0")
    assert (row["parameters"], row["optimizer"]) == (4 * NUM_PARAMETERS, 12)
    with pytest.raises(ValueError, match="has no weights yet"):
        memory.report(keras.Sequential([keras.layers.Dense(2)]))
