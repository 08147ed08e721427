"""Rows that are sorted by expert and sent to their ranks, against one row after the other."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf import Mesh, collectives
from llmos_tf.layers.dispatch import apply_at_owners, apply_grouped
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

WIDTH, EXPERTS = 3, 4
# Products of small float64 numbers: a row by the wrong kernel is off by far more.
EXACT = {"rtol": 0, "atol": 1e-12}
# A busy machine is not a bug.
relaxed = settings(deadline=None, max_examples=30)


def kernels(seed=0):
    return tf.constant(np.random.default_rng(seed).normal(size=(EXPERTS, WIDTH, WIDTH)))


def by_kernels(kernels):
    """Each group of rows by its kernel."""

    def apply(x, counts):
        groups = tf.split(x, counts, num=len(kernels))
        return tf.concat([tf.matmul(g, k) for g, k in zip(groups, kernels, strict=True)], 0)

    return apply


def one_by_one(x, groups, kernels):
    """The result, and the gradients of sum(y²) by rows and kernels."""
    y, dx, dk = np.zeros_like(x), np.zeros_like(x), np.zeros_like(kernels)
    for i, group in enumerate(groups):
        if group < len(kernels):
            y[i] = x[i] @ kernels[group]
            dx[i] = kernels[group] @ (2 * y[i])
            dk[group] += np.outer(x[i], 2 * y[i])
    return y, dx, dk


def with_gradients(function, x, kernels):
    with tf.GradientTape() as tape:
        tape.watch([x, kernels])
        y = function(x, kernels)
        loss = tf.reduce_sum(y**2)
    return y, *tape.gradient(loss, [x, kernels])


@relaxed
@given(groups=st.lists(st.integers(0, EXPERTS), max_size=12), seed=st.integers(0, 99))
def test_each_row_gets_its_group(groups, seed):
    """Fails if a row is put into another slot, comes back to another place, or a row of no group
    has a result; also for no rows at all and groups without any."""
    x = np.random.default_rng(seed).normal(size=(len(groups), WIDTH))
    k = kernels(seed)

    def function(x, k):
        groups_n = tf.constant(groups, tf.int32)
        return apply_grouped(by_kernels(tf.unstack(k)), x, groups_n, EXPERTS)

    actual = with_gradients(function, tf.constant(x), k)
    for value, expected in zip(actual, one_by_one(x, groups, k.numpy()), strict=True):
        np.testing.assert_allclose(value, expected, **EXACT)


@pytest.mark.parametrize("ways", [2, 4])
def test_rows_travel_to_the_ranks_of_their_experts(ways):
    """Fails if a row goes to another rank or comes back to another place, if a pair of ranks has
    no room for its rows, if gradients stay where they are, or if a second call with other counts
    meets the buffers of the first. Routings: mixed, all to one expert, none at all."""
    strategy = MeshStrategy(Mesh(expert=ways))
    owned, rows = EXPERTS // ways, 6
    rng = np.random.default_rng(ways)
    x = rng.normal(size=(ways, rows, WIDTH))
    k = kernels().numpy()

    @tf.function(autograph=False)
    def run(groups):
        def program(groups):
            me = current_program().axis_index("expert")
            mine = tf.constant(k)[me * owned : (me + 1) * owned]
            y, dx, dk = with_gradients(
                lambda x, k: apply_at_owners(by_kernels(tf.unstack(k)), x, groups[me], EXPERTS),
                tf.constant(x)[me],
                tf.ensure_shape(mine, [owned, WIDTH, WIDTH]),
            )
            return [collectives.all_gather(value, "expert") for value in (y, dx, dk)]

        return strategy.run(program, args=(groups,))

    routings = [rng.integers(0, EXPERTS + 1, (ways, rows)), np.full((ways, rows), 1)]
    routings += [np.full((ways, rows), EXPERTS), rng.integers(0, EXPERTS + 1, (ways, rows))]
    for groups in routings:
        actual = run(tf.constant(groups, tf.int32))
        expected = one_by_one(x.reshape(-1, WIDTH), groups.reshape(-1), k)
        for value, truth in zip(actual, expected, strict=True):
            np.testing.assert_allclose(value, truth, **EXACT)
