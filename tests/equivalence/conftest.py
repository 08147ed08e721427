"""Collects what the cells of the matrix measure, and writes it down when asked to."""

import pytest

from equivalence import document


def pytest_addoption(parser):
    parser.addoption(
        "--write-equivalence",
        action="store_true",
        help="write docs/equivalence.md from what the cells of tests/equivalence measure",
    )


@pytest.fixture
def record_cell(record_property):
    """(cell, difference): keeps what a cell has measured with its test's report."""

    def record(cell, difference):
        record_property("equivalence", [*document.name_of(cell), difference])

    return record


def pytest_terminal_summary(terminalreporter, config):
    # With workers, reports come together in the process that started them.
    if hasattr(config, "workerinput") or not config.getoption("write_equivalence", default=False):
        return
    measured = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "equivalence":
                title, column, difference = value
                measured[title, column] = difference
    terminalreporter.write_line(document.write(measured))
