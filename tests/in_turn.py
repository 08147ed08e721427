"""Which cells of a table of tests run with every change."""

import itertools

import pytest


def in_turn(rows, columns, every):
    """Every pair of a row and a column; of each row, one cell in `every` runs with every change.

    It is another one in the next row, so that each column has its turn. The others are nightly.

    Args:
        rows: values of the first argument.
        columns: values of the second argument.
        every: how many cells have one that runs.

    Returns:
        Parameters of `pytest.mark.parametrize`.
    """
    return [
        pytest.param(row, column, marks=[] if (i + j) % every == 0 else pytest.mark.nightly)
        for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns))
    ]
