"""Random graphs of rows and weights, and their gradients, on ranks against one device."""

import numpy as np
import pytest
from partitioning.harness import Partitioned
from partitioning.random_graphs import random_function, values_of, which_have_rows

# Graphs of one trace.
_TOGETHER = 5
_USUAL, _ALL = 30, 1000
GROUPS = [
    pytest.param(first, marks=[] if first < _USUAL else pytest.mark.nightly)
    for first in range(0, _ALL, _TOGETHER)
]


@pytest.mark.parametrize("first", GROUPS)
def test_a_random_graph_is_that_of_one_device(first):
    # Fails if rules that are right one by one are not right together, or the planner or the
    # emission is wrong in a place that no test was written for.
    functions = [random_function(seed) for seed in range(first, first + _TOGETHER)]
    rng = np.random.default_rng(first)
    ways, is_static = int(rng.integers(2, 5)), bool(rng.random() < 0.3)
    numbers = [12] if is_static else [int(rng.choice([12, 7])), int(rng.choice([3, 2, 1]))]
    partitioned = Partitioned(
        lambda *inputs: [function(*inputs) for function in functions],
        values_of(12),
        which_have_rows(),
        is_static,
    )
    for num_rows in numbers:
        # Thirty ops, each of which may multiply what the sums before it differ by.
        partitioned.compare(ways, values_of(num_rows, seed=first), rtol=1e-9, atol=1e-11)
