"""Dropout: its rate, and which ranks drop the same entries."""

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh, collectives
from llmos_tf.layers import Dropout
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

RATE, SHAPE = 0.3, (40, 50)


def dropped_on_each_rank(sequence_parallel):
    """Masks of two calls of a layer and of one that is split over `tensor`: [data, tensor, ...]."""
    strategy = MeshStrategy(Mesh(data=2, tensor=2), sequence_parallel=sequence_parallel)
    with strategy.scope():
        plain = Dropout(RATE, seed=1)
        split = Dropout(RATE, split_over_tensor=True, seed=2)

    def program():
        ones = tf.ones(SHAPE)
        results = [layer(ones, training=True) for layer in (plain, plain, split)]
        return collectives.all_gather(tf.stack(results)[tf.newaxis], ("data", "tensor"))

    results = strategy.run(program).values[0].numpy()
    kept = results[results != 0]
    np.testing.assert_allclose(kept, 1 / (1 - RATE), rtol=1e-6)
    return results.reshape(2, 2, 3, *SHAPE) == 0


def test_ranks_drop_alike_where_they_hold_the_same_activation():
    """Fails if ranks with other rows draw the same mask, or if ranks that hold the same activation
    draw different ones (they would no longer compute one model), or other heads the same one."""
    mask = dropped_on_each_rank(sequence_parallel=False)
    for call in (0, 1):
        assert (mask[:, 0, call] == mask[:, 1, call]).all()
        assert (mask[0, 0, call] != mask[1, 0, call]).any()
    assert (mask[0, 0, 0] != mask[0, 0, 1]).any()
    assert len({mask[d, t, 2].tobytes() for d in (0, 1) for t in (0, 1)}) == 4
    # 2,000 entries in each mask: a share of 0.3 has a standard deviation of 0.01.
    assert np.abs(mask.mean((3, 4)) - RATE).max() < 0.05


def test_ranks_drop_otherwise_where_positions_are_split():
    """Fails if ranks drop the same entries of the different positions that they hold."""
    mask = dropped_on_each_rank(sequence_parallel=True)
    for layer in (0, 2):
        assert len({mask[d, t, layer].tobytes() for d in (0, 1) for t in (0, 1)}) == 4


@pytest.mark.parametrize("training", [False, None])
def test_nothing_is_dropped_outside_of_training(training):
    """Fails if prediction drops, or scales."""
    x = tf.random.stateless_normal(SHAPE, seed=[0, 0])
    assert (Dropout(RATE)(x, training=training) == x).numpy().all()
    assert (Dropout(0.0)(x, training=True) == x).numpy().all()


def test_one_device_drops_at_the_rate_and_keeps_the_mean():
    """Fails for a rate that is taken for the share that is kept, or a missing scale; with 1e5
    entries the mean of the result has a standard deviation of 0.002."""
    y = Dropout(RATE, seed=0)(tf.ones([100_000]), training=True).numpy()
    assert abs((y == 0).mean() - RATE) < 0.01
    assert abs(y.mean() - 1) < 0.01
