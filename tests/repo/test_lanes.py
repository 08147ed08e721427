"""The lanes of the tests: their markers, their durations, and results that processes share."""

import types
from pathlib import Path

import durations
import keras
import pytest
import references
from lanes import command_alone, in_turn, refuse_two_lanes, usual

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]


def is_nightly(parameter):
    return [mark.name for mark in parameter.marks] == ["nightly"]


def test_cells_that_are_not_named_are_nightly():
    # Fails if a cell is lost, or runs in another lane than it is said to.
    cells = usual(["a", "b", "c"], "b")
    assert [cell.values for cell in cells] == [("a",), ("b",), ("c",)]
    assert [is_nightly(cell) for cell in cells] == [True, False, True]
    with pytest.raises(ValueError, match=r"Not in the table: \['d'\]"):
        usual(["a"], "d")


def test_each_column_has_its_turn():
    # Fails if the normal lane runs the same column of every row.
    cells = in_turn(["x", "y"], [1, 2], 2)
    assert [c.values for c in cells if not is_nightly(c)] == [("x", 1), ("y", 2)]
    assert len(cells) == 4


def item(*names):
    marked = dict.fromkeys(names, True)
    return types.SimpleNamespace(nodeid="tests/a.py::b", get_closest_marker=marked.get)


def test_a_test_of_two_lanes_is_refused():
    # Fails if `-m fast` may run what is too long for every change.
    refuse_two_lanes([item("fast"), item("nightly"), item()])
    with pytest.raises(pytest.UsageError, match="b is marked fast and nightly"):
        refuse_two_lanes([item("fast", "nightly")])


def test_a_failing_test_says_how_to_run_it_alone():
    # Fails if the command deselects a nightly test.
    assert command_alone(item()) == "python3 -m pytest 'tests/a.py::b'"
    assert command_alone(item("nightly")) == "python3 -m pytest -m '' 'tests/a.py::b'"


def test_seconds_of_a_folder():
    # Fails if tests of a folder count for another one, or a folder has no limit.
    folders = ["tests/unit/layers/test_a.py::b[c/d]", "tests/unit/strategies/engine/test_e.py::f"]
    assert list(map(durations.folder_of, folders)) == ["tests/unit/layers", "tests/unit/strategies"]
    totals = {"tests/a": 3.0, "tests/b": 5.0, "tests/c": 1.0}
    assert durations.over_budget(totals, {"tests/a": 3.0, "tests/b": 4.0}) == [
        "tests/b took 5 s, its budget is 4 s",
        "tests/c took 1 s and has no budget: add one to BUDGETS",
    ]


def test_every_folder_of_tests_has_a_budget():
    # Fails if a new folder of tests is not bounded, or one that is gone still is.
    found = {
        durations.folder_of(path.relative_to(ROOT).as_posix())
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    assert set(durations.BUDGETS["normal"]) == found
    assert set(durations.BUDGETS["nightly"]) <= found


def test_a_result_is_computed_once(monkeypatch, tmp_path):
    # Fails if processes do not share a result, or one of another precision or argument is taken.
    monkeypatch.setenv(references.FOLDER, str(tmp_path))
    calls = []

    def compute(name, scale=1):
        calls.append(name)
        return name, scale

    one, other = references.shared(compute), references.shared(compute)
    assert one("a") == one("a") == other("a") == ("a", 1)
    assert other("a", scale=2) == ("a", 2)
    assert calls == ["a", "a"]
    keras.config.set_floatx("float64")
    one("a")
    assert len(calls) == 3
    monkeypatch.delenv(references.FOLDER)
    references.shared(compute)("a")
    assert len(calls) == 4


def test_unit_tests_mirror_the_sources():
    # Fails if a folder of sources moves and its tests stay.
    for folder in (path for path in (ROOT / "tests" / "unit").rglob("*") if path.is_dir()):
        below = folder.relative_to(ROOT / "tests" / "unit")
        if "__pycache__" not in below.parts:
            places = [ROOT / below, ROOT / "llmos_tf" / below]
            assert any((place / "__init__.py").exists() for place in places), below
