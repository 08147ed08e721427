"""The lanes of the tests: fast, normal and nightly (see CONTRIBUTING.md).

`usual` and `in_turn` say which cells of a table of tests run with every change; the others are
nightly.
"""

import itertools

import pytest


def usual(cells, *every_change):
    """All cells, of which only some run with every change.

    Args:
        cells: values of one argument, or tuples of values of several.
        every_change: the cells that run with every change.

    Returns:
        Parameters of `pytest.mark.parametrize`.

    Raises:
        ValueError: a cell that is none of the table.
    """
    cells = list(cells)
    unknown = [cell for cell in every_change if cell not in cells]
    if unknown:
        raise ValueError(f"Not in the table: {unknown}. Received the cells {cells}.")
    return [
        pytest.param(
            *(cell if isinstance(cell, tuple) else (cell,)),
            marks=[] if cell in every_change else pytest.mark.nightly,
        )
        for cell in cells
    ]


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
    pairs = itertools.product(enumerate(rows), enumerate(columns))
    chosen = [(row, column) for (i, row), (j, column) in pairs if (i + j) % every == 0]
    return usual(itertools.product(rows, columns), *chosen)


def refuse_two_lanes(items):
    """Refuses a test that is fast and nightly: `-m fast` would run what takes too long.

    Args:
        items: collected tests.

    Raises:
        pytest.UsageError: one has both marks.
    """
    for item in items:
        if item.get_closest_marker("fast") and item.get_closest_marker("nightly"):
            raise pytest.UsageError(f"{item.nodeid} is marked fast and nightly. Take one away.")


def command_alone(item):
    """Returns the command that runs a test alone.

    Args:
        item: the test.
    """
    lane = " -m ''" if item.get_closest_marker("nightly") else ""
    return f"python3 -m pytest{lane} '{item.nodeid}'"
