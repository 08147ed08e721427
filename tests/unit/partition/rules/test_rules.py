"""Rules: results on two, three and four ranks are those of one device, for each placement."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from lanes import usual
from partitioning import (
    creation,
    elementwise,
    indexing,
    movement,
    products,
    randomness,
    reductions,
    rowwise,
)
from partitioning.cases import Table
from partitioning.harness import Partitioned

from llmos_tf.partition.rules import CREATIONS, RULES, lists

TABLES = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (
        creation,
        elementwise,
        indexing,
        movement,
        products,
        randomness,
        reductions,
        rowwise,
    )
}
# Even and uneven shards, and batches of fewer rows than ranks.
NUMBERS = (12, 7, 2, 1)


@functools.cache
def table(name, static=False, is_brief=False):
    """Traced and planned once for all numbers of ranks."""
    return Table(TABLES[name], static, is_brief)


def test_every_rule_has_a_case():
    # Fails if a rule is added, and nothing says that it is right. What lists of tensors hold is
    # tested where they are used (test_lists.py).
    tested = {one.op for cases in TABLES.values() for one in cases}
    of_lists = {*lists.RULES, *lists.CREATIONS}
    assert (set(RULES) | set(CREATIONS)) - of_lists <= tested


@pytest.mark.parametrize("name", TABLES)
def test_some_placements_on_three_ranks(name):
    # Fails if a rule of an op is wrong for rows that are sharded, or gives up on them.
    table(name, is_brief=True).check()
    for num_rows in (7, 2, 1):
        cases = table(name, is_brief=True)
        cases.partitioned.compare(3, cases.values(num_rows))


@pytest.mark.nightly
@pytest.mark.parametrize("ways", [2, 3, 4])
@pytest.mark.parametrize("name", TABLES)
def test_all_placements(name, ways):
    # Fails if a rule is wrong for some placement of its inputs, as of parts of a sum.
    cases = table(name)
    cases.check()
    for num_rows in NUMBERS:
        cases.partitioned.compare(ways, cases.values(num_rows, seed=num_rows))


@pytest.mark.parametrize(
    ("name", "ways"),
    usual([(n, w) for n in TABLES for w in (2, 3, 4)], ("creation", 4), ("movement", 2)),
)
def test_batches_of_a_known_number_of_rows(name, ways):
    # Fails if a rule is wrong where shapes are static, as of a dataset that drops the remainder.
    cases = table(name, static=True, is_brief=True)
    cases.partitioned.compare(ways, cases.values(12))


def test_squeezing_all_dimensions_of_one():
    # Fails if a rank's only row is taken for a dimension of one. One device removes the dimension
    # of the rows, of a batch of one row.
    rows = np.arange(18.0).reshape([6, 3, 1])
    partitioned = Partitioned(tf.squeeze, [rows], [True])
    for num_rows in (6, 3, 2):
        partitioned.compare(3, [rows[:num_rows]])
