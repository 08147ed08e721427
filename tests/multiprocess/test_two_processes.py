"""Two processes, two devices each: what spans them is what one process, or numpy, computes.

Both run `worker.py` once, and two others `strategy_worker.py`; each test here looks up one of their
checks.
"""

import ast
import contextlib
import fcntl
import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lanes import usual

ROOT = Path(__file__).resolve().parents[2]
# What spans processes, and a strategy's stock Keras scripts.
WORKERS = ["worker.py", "strategy_worker.py"]
NUM_PROCESSES = 2
# Seconds; alone they take some 180, beside other work twice that. A worker that waits ends after
# 900 and shows where.
TIME_LIMIT = 920
PORT_TAKEN = ("Could not start gRPC server", "cannot listen at its address")

# What one of the other checks covers on a mesh that has the same axes across processes.
NIGHTLY = {
    ("strategy_worker.py", "check_fit_data"),
    ("strategy_worker.py", "check_fit_data_tensor"),
    ("strategy_worker.py", "check_fit_fsdp"),
    ("strategy_worker.py", "check_fit_pipe_inside"),
    ("strategy_worker.py", "check_fit_pipe_tensor"),
    ("worker.py", "check_fit_tensor_across"),
}


def checks():
    """Workers and their checks, read and not imported: they must not meet this process's mesh."""
    found = []
    for worker in WORKERS:
        tree = ast.parse(Path(__file__).with_name(worker).read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        found += [(worker, name) for name in names if name.startswith("check_")]
    assert {worker for worker, _ in found} == set(WORKERS)
    return found


def free_ports(count):
    """Ports that nobody listens on. All are open at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


def start(worker, checks, task, ports, folder, log):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    environment["PYTHONPATH"] = str(ROOT)
    # They talk to each other and not by way of a proxy.
    environment["no_proxy"] = "localhost"
    arguments = [str(task), ",".join(map(str, ports))]
    if worker == "strategy_worker.py":
        cluster = {"worker": [f"localhost:{port}" for port in ports]}
        config = {"cluster": cluster, "task": {"type": "worker", "index": task}}
        environment["TF_CONFIG"] = json.dumps(config)
        arguments = [str(folder)]
    command = [sys.executable, str(Path(__file__).with_name(worker)), *arguments, *checks]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_workers(worker, checks, folder):
    """Runs both to their end, or until one fails or time is up; returns what each has printed.

    One that fails leaves the other waiting for it, so then both are killed.
    """
    ports = free_ports(NUM_PROCESSES)
    paths = [folder / f"worker_{task}.log" for task in range(NUM_PROCESSES)]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(path.open("wb")) for path in paths]
        workers = [start(worker, checks, task, ports, folder, log) for task, log in enumerate(logs)]
        deadline = time.monotonic() + TIME_LIMIT
        try:
            while time.monotonic() < deadline:
                states = [worker.poll() for worker in workers]
                if None not in states or any(states):
                    break
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.kill()
            codes = [worker.wait() for worker in workers]
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return [
        f"--- worker {task}, exit status {code}\n{text}"
        for task, (code, text) in enumerate(zip(codes, texts, strict=True))
    ]


def run_with_free_ports(worker, checks, tmp_path_factory):
    """As `run_workers`, and again where another process has taken a port in between."""
    for _ in range(3):
        printed = run_workers(worker, checks, tmp_path_factory.mktemp("workers"))
        if not any(taken in text for text in printed for taken in PORT_TAKEN):
            break
    return printed


@pytest.fixture(scope="module")
def outputs_of(tmp_path_factory, worker_id):
    """What workers have printed. Test processes share it, or each of them would run all workers."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent

    @functools.cache
    def run(worker, nightly):
        printed = shared / f"{worker}-{nightly}.json"
        names = [name for other, name in checks() if other == worker]
        names = [name for name in names if ((worker, name) in NIGHTLY) == nightly]
        with (shared / f"{printed.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not printed.exists():
                found = run_with_free_ports(worker, names, tmp_path_factory)
                printed.write_text(json.dumps(found))
            return json.loads(printed.read_text())

    return run


@pytest.mark.parametrize(
    ("worker", "check"), usual(checks(), *(c for c in checks() if c not in NIGHTLY))
)
def test_two_processes(outputs_of, worker, check):
    """Catches what each check of the worker says: see there."""
    outputs = outputs_of(worker, (worker, check) in NIGHTLY)
    for text in outputs:
        assert f"passed {check}\n" in text, "\n".join(outputs)


@pytest.mark.nightly
@pytest.mark.parametrize("check", ["alone_a_worker_that_does_not_come", "alone_a_step_that_fails"])
def test_what_ends_the_collectives(tmp_path_factory, check):
    """Catches what the check says, in two processes of its own."""
    outputs = run_with_free_ports("strategy_worker.py", [check], tmp_path_factory)
    for text in outputs:
        assert f"passed {check}\n" in text, "\n".join(outputs)
