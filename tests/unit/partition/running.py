"""Functions of a batch, run as one device does and partitioned by rows over virtual devices."""

import functools

import numpy as np
import tensorflow as tf

from llmos_tf.collectives import batch
from llmos_tf.mesh import Mesh
from llmos_tf.partition.graph.flat_graph import FlatGraph
from llmos_tf.partition.graph.placements import REPLICATED, Sharded
from llmos_tf.partition.planner import Planner
from llmos_tf.strategies import MeshStrategy

ROWS = np.random.default_rng(0).normal(size=(5, 4))


@functools.cache
def strategy_of(ways):
    return MeshStrategy(Mesh(data=ways))


def with_gradient(function):
    """The sum of squares of what a function returns, what it returns, and the gradient."""

    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
            loss = tf.reduce_sum(y * y)
        return loss, y, tape.gradient(loss, x)

    return both


def partitioned(function, x, ways):
    """What the ranks of a mesh return for their rows, put together where they differ."""
    strategy = strategy_of(ways)
    parts = [x[i * len(x) // ways : (i + 1) * len(x) // ways] for i in range(ways)]
    value = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(parts[context.replica_id_in_sync_group])
    )
    results = strategy.run(batch.weigh_rows(lambda x: function(x)), (value,))
    return [_whole(strategy.experimental_local_results(y), len(x)) for y in results]


def _whole(parts, rows):
    parts = [part.numpy() for part in parts]
    if parts[0].ndim and sum(map(len, parts)) == rows:
        return np.concatenate(parts)
    for part in parts[1:]:
        np.testing.assert_array_equal(part, parts[0])
    return parts[0]


def check_parity(function, x=ROWS, ways=(2, 3), rtol=1e-12):
    """Compares results and gradient with one device's."""
    both = with_gradient(function)
    expected = tf.function(both, autograph=False)(tf.constant(x))
    for number in ways:
        for got, want in zip(partitioned(both, x, number), expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol, 1e-13)


def plan_of(function, *shapes, dtype=tf.float64):
    """The plan of a function whose arguments are sharded by rows."""
    specs = [tf.TensorSpec(shape, dtype) for shape in shapes]
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    captured = [False] * len(concrete.captured_inputs)
    graph = FlatGraph(concrete.graph, [*(bool(shape) for shape in shapes), *captured])
    inputs = [Sharded(0) if shape else REPLICATED for shape in shapes] + [None] * len(captured)
    return Planner(graph, inputs).plan


def sent(plan):
    """The types of the ops whose values are gathered or reduced, functions included."""
    return [
        change.value.node.type
        for one in plan.with_inner()
        for change in one.changes
        if change.source != REPLICATED
    ]


def without_rule(plan):
    """The types of the ops that are computed whole although they were given rows."""
    return [node.type for one in plan.with_inner() for node in one.without_rule]
