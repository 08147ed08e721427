"""Plans: where values are sharded, gathered and reduced."""

import numpy as np
import pytest
import tensorflow as tf
from partitioning.harness import Partitioned

from llmos_tf.partition.graph.placements import Sharded
from llmos_tf.partition.planner import Compute

_ROWS = np.linspace(-1, 1, 24).reshape([8, 3])
_WEIGHTS = np.linspace(-1, 2, 12).reshape([3, 4])


def _placements(partitioned, kind):
    """Where the ops of a type have their first output."""
    steps = partitioned.plan.steps
    return [
        step.choice.outputs[0]
        for step in steps
        if isinstance(step, Compute) and step.node.type == kind
    ]


def test_rows_that_are_coupled_are_taken_apart_again():
    # Fails if each rank computes a model for all rows, since they were concatenated or reversed.
    def fn(x, w):
        both = tf.concat([x, x[::-1]], 0)
        return tf.reduce_sum(tf.tanh(both @ w), 1)

    partitioned = Partitioned(fn, [_ROWS, _WEIGHTS], [True, False])
    assert partitioned.without_rule == ["ConcatV2", "StridedSlice"]
    assert _placements(partitioned, "MatMul") == [Sharded(0)]
    for num_rows in (8, 3, 1):
        partitioned.compare(3, [_ROWS[:num_rows], _WEIGHTS])


@pytest.mark.parametrize("kind", ["stateless", "seeded", "unseeded"])
def test_noise_for_each_row_is_sharded(kind):
    # Fails if each rank computes a generator for the noise of all rows.
    def fn(x, w):
        shape = [tf.shape(x)[0], 3]
        if kind == "stateless":
            noise = 2 * tf.random.stateless_normal(shape, [1, 2], dtype=x.dtype)
        else:
            seed = 3 if kind == "seeded" else 0
            noise = tf.raw_ops.RandomStandardNormal(shape=shape, dtype=x.dtype, seed=seed)
        return tf.gradients(tf.tanh(noise @ w), w)

    partitioned = Partitioned(fn, [_ROWS, _WEIGHTS], [True, False])
    assert set(_placements(partitioned, "TanhGrad")) == {Sharded(0)}
    if kind == "unseeded":
        partitioned.run(3, [_ROWS, _WEIGHTS])
    else:
        partitioned.compare(3, [_ROWS, _WEIGHTS])


def test_noise_without_a_seed_is_the_same_on_all_ranks():
    # Fails if ranks go on with numbers of their own, of which the weights become others.
    def fn(x):
        noise = tf.raw_ops.RandomUniform(shape=[2, 3], dtype=tf.float64)
        return tf.tanh(noise), tf.raw_ops.RandomShuffle(value=tf.range(50)), tf.reduce_sum(x)

    # `run` compares what the ranks return.
    Partitioned(fn, [_ROWS], [True]).run(3, [_ROWS])


def test_identities_with_a_custom_gradient_send_nothing():
    # Fails if a custom gradient has rows gathered, as that of `silu`.
    def fn(x):
        return tf.gradients(tf.nn.silu(x), x)

    partitioned = Partitioned(fn, [_ROWS], [True])
    assert (partitioned.without_rule, partitioned.plan.changes) == ([], [])
    partitioned.compare(2, [_ROWS])
