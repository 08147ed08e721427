"""Runs tests on a copy of the sources in which a bug is planted."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from planted_bugs.bugs import Bug

# Seconds. Alone a bug takes half a minute.
TIME_LIMIT = 600
ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "docs",
    "llmos_tf",
    "models",
    "scripts",
    "strategies",
    "tests",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
    "CONTRIBUTING.md",
    "README.md",
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How the tests judged a bug.

    Attributes:
        found_by: node ids of tests that failed; none where the bug was not found.
        seconds: the run's.
        output: of pytest.
    """

    found_by: tuple[str, ...]
    seconds: float
    output: str


def judge(bug: Bug) -> Verdict:
    """Runs the bug's tests on a copy of the sources with a bug, up to the first failure.

    Args:
        bug: from `bugs.BUGS`.

    Returns:
        The verdict.

    Raises:
        ValueError: the bug does not fit the source.
        RuntimeError: pytest did not run the tests.
        subprocess.TimeoutExpired: the tests wait for something that does not come. Take a bug that
            gives wrong numbers instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        copy.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(source, copy / name, ignore=ignored)
            else:
                shutil.copy(source, copy / name)
        bug.plant(copy)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        started = time.monotonic()
        done = subprocess.run(
            [*command, *bug.tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
        )
        seconds = time.monotonic() - started
    found = tuple(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE))
    if done.returncode != bool(found):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return Verdict(found, seconds, done.stdout)
