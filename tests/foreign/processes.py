"""Runs files of Keras's tests in processes with a time limit."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from foreign import reports

ROOT = Path(__file__).resolve().parents[2]


def keras_folder() -> Path:
    """Returns the folder of Keras's sources and tests, without importing Keras."""
    return Path(importlib.util.find_spec("keras").origin).parent / "src"


def test_files(paths: Sequence[str]) -> list[Path]:
    """Returns the test files of folders and files below `keras/src`.

    Args:
        paths: such as "metrics" and "trainers/trainer_test.py".

    Raises:
        ValueError: a path without tests.
    """
    files = []
    for path in paths:
        start = keras_folder() / path
        found = [start] if start.is_file() else sorted(start.rglob("*_test.py"))
        if not found:
            raise ValueError(f"There must be tests in {start}. Received: {path!r}.")
        files += found
    return list(dict.fromkeys(files))


class Run:
    """All files, under one strategy.

    Args:
        folder: of the results of all runs.
        name: "record", or the strategy to compare with it.
        limit: seconds per file.
        together: number of files that share a process; starting one takes 5 s.
    """

    def __init__(self, folder: Path, name: str, limit: float, together: int):
        self.name = name
        self._folder = folder
        self._limit = limit
        self._together = together

    @property
    def path(self) -> Path:
        """The file of reports."""
        return self._folder / f"{self.name}.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        """Returns the report of each test."""
        return reports.read(self.path) if self.path.exists() else []

    def run(self, files: Sequence[Path], wanted: Collection[str] | None = None) -> None:
        """Runs the tests of files that have no report yet.

        Args:
            files: of tests.
            wanted: ids of the tests to run; None for all.

        Raises:
            RuntimeError: pytest does not run the tests.
        """  # noqa: DOC502
        self._folder.mkdir(parents=True, exist_ok=True)
        if wanted is not None:
            self._wanted.write_text("\n".join(sorted(wanted)), encoding="utf-8")
        self._run_all(files, wanted)
        died = {line["test"] for line in self.lines() if line["outcome"] == "died"}
        if died:
            # A wait that the machine never ends is not the test's fault: another time, with the
            # same result if it is.
            self._forget(died)
            self._run_all(files, died)

    def _run_all(self, files: Sequence[Path], wanted: Collection[str] | None) -> None:
        """Runs the files that have a wanted test without a report."""
        if wanted is not None:
            left = set(wanted) - {line["test"] for line in self.lines()}
            names = {test.partition("::")[0] for test in left}
            folder = keras_folder()
            files = [file for file in files if file.relative_to(folder).as_posix() in names]
        for start in range(0, len(files), self._together):
            self._run_together(files[start : start + self._together])

    def _forget(self, tests: Collection[str]) -> None:
        """Removes the reports of tests."""
        kept = [json.dumps(line) for line in self.lines() if line["test"] not in tests]
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    @property
    def _wanted(self) -> Path:
        return self._folder / f"{self.name}.wanted"

    def _run_together(self, files: Sequence[Path]) -> None:
        """Starts another process for as long as the last one died in a test."""
        ended = False
        while not ended:
            num_begun = len(self.lines())
            status = self._status_of_process(files)
            lines = self.lines()
            has_begun = len(lines) > num_begun
            # Of pytest: passed, failed, and no tests. A process that ran into the time limit of a
            # test has the status 1 too.
            died = has_begun and lines[-1]["outcome"] == "died"
            ended = status in (0, 1, 5) and not died
            if not ended and not has_begun:
                raise RuntimeError(
                    f"Pytest ended with the status {status} (None: time limit) before any test of "
                    f"{', '.join(file.name for file in files)}. See {self._log}."
                )

    @property
    def _log(self) -> Path:
        return self._folder / f"{self.name}.log"

    def _status_of_process(self, files: Sequence[Path]) -> int | None:
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull]
        command += [f"--rootdir={keras_folder()}", "--import-mode=importlib", "--tb=no", "-rN"]
        command += ["-p", "no:cacheprovider", "-p", "no:warnings"]
        command += ["--continue-on-collection-errors"]
        command += ["-p", "foreign.keras_under_strategy", f"--report={self.path}"]
        results = self._folder / "recordings"
        if self.name == "record":
            command += [f"--record={results}"]
        else:
            command += [f"--compare={results}", f"--strategy={self.name}"]
            command += [f"--only={self._wanted}"]
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with self._log.open("a", encoding="utf-8") as log:
            try:
                return subprocess.run(
                    [*command, *map(str, files)],
                    cwd=self._folder,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=self._limit * len(files),
                ).returncode
            except subprocess.TimeoutExpired:
                return None
