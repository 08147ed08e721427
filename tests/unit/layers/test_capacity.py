"""Which tokens an expert has room for."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf import Mesh, collectives
from llmos_tf.layers.activation_sharding import entered, open_stream
from llmos_tf.layers.capacity import within_capacity
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

EXPERTS, FACTOR = 4, 0.75


def first_come_first_served(experts, num_experts, factor):
    """Token after token of each sequence, and of a token the best expert first."""
    rows, length, per_token = experts.shape
    kept = np.full_like(experts, num_experts)
    for row in range(rows):
        room = np.full(num_experts, math.ceil(factor * length * per_token / num_experts))
        for t in range(length):
            for k in range(per_token):
                expert = experts[row, t, k]
                if room[expert] > 0:
                    room[expert] -= 1
                    kept[row, t, k] = expert
    return kept


def routing(rows, length, per_token, num_experts, seed):
    """A random choice of different experts for each token."""
    scores = np.random.default_rng(seed).random((rows, length, num_experts))
    return np.argsort(scores, -1)[..., :per_token].astype("int32")


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 7),
    num_experts=st.integers(2, 5),
    factor=st.sampled_from([0.3, 0.5, 1.0, 1.25, 9.0]),
    seed=st.integers(0, 99),
)
def test_first_come_first_served(rows, length, num_experts, factor, seed):
    """Fails if room is counted over another set of tokens, in another order, or rounded down."""
    experts = routing(rows, length, 2, num_experts, seed)
    kept = within_capacity(tf.constant(experts), num_experts, factor)
    np.testing.assert_array_equal(kept, first_come_first_served(experts, num_experts, factor))


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        # Rows over expert.
        (Mesh(expert=2), {}),
        # Positions over context, in zigzag and in one piece, and over tensor inside of that.
        (Mesh(context=2), {"context_method": "ring"}),
        (Mesh(context=2), {"context_method": "ulysses"}),
        (Mesh(expert=2, context=2, tensor=2), {"sequence_parallel": True}),
    ],
    ids=["expert", "zigzag", "contiguous", "tensor"],
)
def test_every_mesh_keeps_the_same(mesh, options):
    """Fails if a rank counts its own positions only, or in the order in which ranks hold them."""
    experts = routing(2, 8, 2, EXPERTS, 0)
    expected = first_come_first_served(experts, EXPERTS, FACTOR)
    assert (expected == EXPERTS).mean() > 0.2
    strategy = MeshStrategy(mesh, layout_map={}, **options)

    def program():
        stream = open_stream([], tf.TensorShape([2, 8]))
        sequence_parallel = current_program().sequence_parallel
        with entered(stream):
            mine = stream.enter(tf.constant(experts))
            if sequence_parallel:
                mine = collectives.split_to_axis(mine, "tensor", dim=1)
            kept = within_capacity(mine, EXPERTS, FACTOR)
            if sequence_parallel:
                kept = collectives.gather_from_axis(kept, "tensor", dim=1)
        return stream.leave(kept)

    kept = tf.function(lambda: strategy.run(program), autograph=False)()
    np.testing.assert_array_equal(kept, expected)
