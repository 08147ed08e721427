"""A line of JSON for each test, written at once: a process may die in the next one."""

import json
from pathlib import Path
from typing import Any

import pytest

# Characters of an error's text.
LENGTH = 3000


class Reports:
    """The file of a run.

    Args:
        path: of the file, which may hold lines of an earlier process of the same run; None to
            write nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._known = {line["test"] for line in read(path)} if path and path.exists() else set()
        self._seconds = 0.0

    def has(self, test: str) -> bool:
        """Whether a test has begun in an earlier process of this run."""
        return test in self._known

    def begin(self, test: str) -> None:
        """Notes that a test begins: a process that dies in it leaves this line."""
        self._seconds = 0.0
        self._write({"test": test, "outcome": "died"})

    def add_file(self, path: str, error: str) -> None:
        """Notes a file of tests that cannot be imported."""
        self._write({"test": path, "outcome": "not imported", "text": error[-LENGTH:]})

    def add(
        self,
        test: str,
        report: pytest.TestReport,
        error: pytest.ExceptionInfo | None,
        differences: list[str],
    ) -> None:
        """Notes one phase of a test.

        Args:
            test: its id.
            report: of the phase.
            error: that it raised.
            differences: to the results of one device.
        """
        self._seconds += report.duration
        outcome = "excepted" if hasattr(report, "wasxfail") else report.outcome
        # After the phase in which a test failed, phases that pass have nothing to add.
        if report.when == "call" or outcome != "passed":
            line: dict[str, Any] = {"test": test, "outcome": outcome}
            line["seconds"] = round(self._seconds, 2)
            if error is not None:
                line |= _described(error)
            self._write(line | {"differences": differences})

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _described(error: pytest.ExceptionInfo) -> dict[str, Any]:
    frames = [f"{entry.path}:{entry.lineno + 1} {entry.name}" for entry in error.traceback]
    text = str(error.value)
    return {
        "type": type(error.value).__name__,
        "text": text if len(text) < LENGTH else f"{text[: LENGTH // 2]} ... {text[-LENGTH // 2 :]}",
        "frames": frames[-12:],
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the last line of each test."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({line["test"]: line for line in lines}.values())
