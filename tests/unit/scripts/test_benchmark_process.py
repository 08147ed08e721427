"""The processes of a run: what becomes of them when one fails, hangs, or loses its benchmark.

A small program stands for the processes: it needs no framework.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from llmos_tf.scripts import benchmark_process
from llmos_tf.scripts.benchmark_options import BenchmarkOptions, Candidate
from llmos_tf.scripts.flags import FLAGS

pytestmark = pytest.mark.fast

# Answers once; then rank 1 does what the test wants, and rank 0 waits for it. A child of each waits
# too.
WORKER = """
import json, pathlib, subprocess, sys, time
rank = json.loads(sys.argv[-1])["rank"]
child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
with open({path!r}, "a") as file:
    print(child.pid, file=file)
print(json.dumps({{"first_step": rank, "loss": 0, "later_loss": 0}}), flush=True)
sys.stdin.readline()
if rank == 1:
    {does}
time.sleep(600)
"""


@pytest.fixture
def start(monkeypatch, tmp_path):
    """(what rank 1 does) -> the started run."""
    runs = []

    def started(does, patience=60):
        script = tmp_path / "worker.py"
        script.write_text(WORKER.format(path=str(tmp_path / "children"), does=does))
        monkeypatch.setattr(benchmark_process, "_WORKER", (sys.executable, str(script)))
        # Whether it is installed or not.
        monkeypatch.setattr(benchmark_process.kinds.Kind, "missing", lambda self: None)
        options = _options(patience)
        runs.append(benchmark_process.RunProcesses(options, options.candidates[0]))
        runs[-1].start()
        return runs[-1]

    yield started
    for run in runs:
        run.end()


def _options(patience):
    values = {name: FLAGS[name].default for name in BenchmarkOptions.__dataclass_fields__}
    changed = {"run": ("torch-ddp=2",), "ratio": (), "seq_len": 8, "patience": patience}
    return BenchmarkOptions(**values | changed)


@pytest.mark.parametrize(
    ("does", "patience", "words"),
    [
        ('sys.exit("no memory left")', 60, "it ended with exit status 1: no memory left"),
        ("import os; os.kill(os.getpid(), 9)", 60, "it ended with SIGKILL"),
        ('print(json.dumps({"error": "ValueError: no"}), flush=True)', 60, "ValueError: no"),
        ("pass", 1, "it has not answered for 1 s (--patience)"),
    ],
)
def test_a_process_that_fails_takes_its_run_along(start, tmp_path, does, patience, words):
    """Fails if the benchmark waits for the processes that wait for one that failed, says another
    reason, or leaves processes, or children of theirs, behind."""
    run = start(does, patience)
    assert run.error is None
    assert run.first["first_step"] == 0
    begin = time.monotonic()
    run.take_steps(1)
    assert run.error == words or run.error.startswith(words)
    assert time.monotonic() - begin < 20
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert len(children) == 2
    assert _gone(children)
    # The other runs go on, and ask it again.
    run.take_steps(1)
    assert run.rounds == []


def test_a_process_ends_with_its_benchmark():
    """Fails if a process whose benchmark was killed goes on: nobody reads what it says."""
    job = json.dumps(asdict(_options(60).job(Candidate.parse("1"))))
    worker = subprocess.run(
        [*benchmark_process._WORKER, job],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert (worker.returncode, worker.stdout) == (0, b"")


def _gone(pids):
    """Whether they end soon. One that has ended may stay in the list of processes."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return not Path("/proc/self/stat").exists()
    return state != "Z"
