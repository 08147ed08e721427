"""Runs Keras's own tests under strategies, and prints how many agree with one device.

Usage, from the root of a checkout:

    PYTHONPATH=.:tests python3 -m foreign [FOLDER OR FILE OF keras/src ...]
        [--strategies data=2 zero3] [--reports=DIR]

Without paths: tests of trainers, callbacks, metrics, losses, optimizers and layers. Reports stay
in DIR: a line of JSON for each test, with its error and its differences. A second run with the same
DIR runs only what has no report yet. Exit status 1 when a test fails under a strategy.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from foreign import tables
from foreign.processes import Run, test_files

FOLDERS = ("trainers", "callbacks", "metrics", "losses", "optimizers", "layers")
STRATEGIES = ("data=2", "zero3")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="foreign", description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=FOLDERS, help="below keras/src")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="see foreign.scopes")
    parser.add_argument("--reports", type=Path, help="folder of the results; a new one by default")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per file of tests")
    parser.add_argument("--together", type=int, default=8, help="files that share a process")
    options = parser.parse_args(words)
    folder = options.reports or Path(tempfile.mkdtemp(prefix="keras-tests-"))
    files = test_files(options.paths)
    record, again, *runs = (
        Run(folder, name, options.limit, options.together)
        for name in ("record", "none", *options.strategies)
    )
    print(f"record: {len(files)} files", flush=True)
    record.run(files)
    passed = {line["test"] for line in record.lines() if line["outcome"] == "passed"}
    for run in runs:
        print(f"{run.name}: {len(passed)} tests", flush=True)
        run.run(files, passed)
    # One device again: results that are not reproducible say nothing about a strategy.
    doubted = {line["test"] for run in runs for line in tables.failed(run.lines())}
    print(f"none: {len(doubted)} tests", flush=True)
    again.run(files, doubted)
    unstable = {line["test"] for line in again.lines() if line["outcome"] != "passed"}
    print(tables.table(record.lines(), {run.name: run.lines() for run in runs}, unstable))
    print(f"Reports: {folder}")
    return int(any(tables.failed(run.lines(), unstable) for run in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
