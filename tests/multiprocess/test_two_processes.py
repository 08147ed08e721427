"""Two processes, two devices each: what spans them is what one process, or numpy, computes.

Both run `worker.py` once; each test here looks up one of its checks. The mesh lies on the devices
in two ways, so that each axis is once within a process and once across.
"""

import ast
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
NUM_PROCESSES = 2
# Seconds; alone they take some 25. A worker that waits ends after 200 and shows where.
TIME_LIMIT = 220
PORT_TAKEN = "Could not start gRPC server"

pytestmark = pytest.mark.slow


def checks():
    """Names of the worker's checks, read and not imported: it must not meet this process's mesh."""
    tree = ast.parse(WORKER.read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    found = [name for name in names if name.startswith("check_")]
    assert found
    return found


def free_ports(count):
    """Ports that nobody listens on. All are open at once, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]


def start(task, ports, log):
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    environment["PYTHONPATH"] = str(ROOT)
    # They talk to each other and not by way of a proxy.
    environment["no_proxy"] = "localhost"
    command = [sys.executable, str(WORKER), str(task), ",".join(map(str, ports))]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def run_workers(folder):
    """Runs both to their end, or until one fails or time is up; returns what each has printed.

    One that fails leaves the other waiting for it, so then both are killed.
    """
    ports = free_ports(NUM_PROCESSES)
    paths = [folder / f"worker_{task}.log" for task in range(NUM_PROCESSES)]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(path.open("wb")) for path in paths]
        workers = [start(task, ports, log) for task, log in enumerate(logs)]
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


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    for _ in range(3):
        printed = run_workers(tmp_path_factory.mktemp("workers"))
        # Another process may have taken the port in between.
        if not any(PORT_TAKEN in text for text in printed):
            break
    return printed


@pytest.mark.parametrize("check", checks())
def test_two_processes(outputs, check):
    """Catches what each check of the worker says: see there."""
    for text in outputs:
        assert f"passed {check}\n" in text, "\n".join(outputs)
