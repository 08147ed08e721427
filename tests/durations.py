"""Durations of a test run: the slowest tests and each folder's total, printed, written and bounded.

Seconds are those of the process that ran the test (its fixtures included), so with `-n 2` a total
is about twice the time on the clock.
"""

import collections
import json

import pytest

SLOWEST = 30
# A run of fewer seconds than this prints no table.
PRINTED_FROM = 60.0
# Below .pytest_cache/d/durations/.
FILE = "durations.json"

# Seconds that each folder may take on two quiet cores, by lane: twice what was measured, as the
# machine may be busy. `--check-budgets` fails a run that takes longer.
BUDGETS: dict[str, dict[str, float]] = {
    "normal": {
        "tests/equivalence": 500,
        "tests/integration": 1150,
        "tests/multiprocess": 180,
        "tests/repo": 70,
        "tests/unit": 10,
        "tests/unit/checkpoint": 50,
        "tests/unit/collectives": 60,
        "tests/unit/data": 10,
        "tests/unit/files": 10,
        "tests/unit/graph": 10,
        "tests/unit/inference": 40,
        "tests/unit/layers": 95,
        "tests/unit/memory": 10,
        "tests/unit/models": 15,
        "tests/unit/partition": 110,
        "tests/unit/planning": 10,
        "tests/unit/rematerialisation": 35,
        "tests/unit/scripts": 15,
        "tests/unit/sharding": 40,
        "tests/unit/spmd": 5,
        "tests/unit/strategies": 355,
        "tests/unit/testing": 100,
        "tests/unit/training": 40,
    },
    "nightly": {
        "tests/equivalence": 1200,
        "tests/integration": 2600,
        "tests/multiprocess": 260,
        "tests/repo": 1200,
        "tests/unit/inference": 25,
        "tests/unit/layers": 30,
        "tests/unit/partition": 2400,
        "tests/unit/rematerialisation": 25,
        "tests/unit/strategies": 425,
        "tests/unit/testing": 60,
        "tests/unit/training": 25,
    },
}


def folder_of(nodeid: str) -> str:
    """Returns the folder that a test's seconds count for, such as "tests/unit/layers"."""
    parts = nodeid.partition("::")[0].split("/")[:-1]
    return "/".join(parts[:3]) or "."


def over_budget(totals: dict[str, float], budget: dict[str, float]) -> list[str]:
    """Returns a line for each folder that took longer than its budget, or has none."""
    lines = []
    for folder, seconds in sorted(totals.items()):
        if folder not in budget:
            lines.append(f"{folder} took {seconds:.0f} s and has no budget: add one to BUDGETS")
        elif seconds > budget[folder]:
            lines.append(f"{folder} took {seconds:.0f} s, its budget is {budget[folder]:.0f} s")
    return lines


class Durations:
    """A pytest plugin, in the process that collects the reports of all workers."""

    def __init__(self, config: pytest.Config):
        self._config = config
        self._tests: dict[str, float] = collections.defaultdict(float)
        self._over: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tests[report.nodeid] += report.duration

    @property
    def _totals(self) -> dict[str, float]:
        totals = collections.defaultdict(float)
        for nodeid, seconds in self._tests.items():
            totals[folder_of(nodeid)] += seconds
        return dict(totals)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._config.getoption("check_budgets"):
            lane = "nightly" if self._config.option.markexpr == "nightly" else "normal"
            self._over = over_budget(self._totals, BUDGETS[lane])
            if self._over and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._config.pluginmanager.hasplugin("cacheprovider"):
            content = {"folders": self._totals, "tests": dict(self._tests)}
            file = self._config.cache.mkdir("durations") / FILE
            file.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter) -> None:
        totals = self._totals
        if sum(totals.values()) >= PRINTED_FROM:
            terminalreporter.section("durations")
            ranking = sorted(self._tests.items(), key=lambda pair: -pair[1])
            for nodeid, seconds in ranking[:SLOWEST]:
                terminalreporter.line(f"{seconds:7.1f} s  {nodeid}")
            terminalreporter.line("")
            counts = collections.Counter(map(folder_of, self._tests))
            for folder, seconds in sorted(totals.items(), key=lambda pair: -pair[1]):
                terminalreporter.line(f"{seconds:7.1f} s  {folder} ({counts[folder]} tests)")
            whole = sum(totals.values())
            terminalreporter.line(f"{whole:7.1f} s  all ({len(self._tests)} tests)")
        for line in self._over:
            terminalreporter.line(f"over budget: {line}", red=True)
