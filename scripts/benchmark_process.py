"""The processes of one run of llmos-benchmark: started, given turns, and ended together."""

import json
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmos_tf.scripts.benchmark_options import BenchmarkOptions, Candidate
from llmos_tf.scripts.peers import kinds

_WORKER = (sys.executable, "-m", "llmos_tf.scripts.peers.worker")


class RunProcesses:
    """The processes of one run: one, or one a device where the kind says so.

    A run that cannot go on says why in `error`, or in `missing` where a package is not installed,
    and does nothing from then on.

    Args:
        options: of the benchmark.
        candidate: the run.
    """

    def __init__(self, options: BenchmarkOptions, candidate: Candidate):
        self.name = candidate.name
        self.devices = candidate.devices
        self.rounds: list[list[float]] = []
        self.first: dict[str, Any] = {}
        self.peak_bytes = 0
        self.error: str | None = None
        kind = kinds.KINDS.get(candidate.kind)
        self.is_ours = kind is None
        self.missing = kind.missing() if kind else None
        self._job = options.job(candidate)
        self._count = candidate.devices if kind and kind.in_processes else 1
        self._patience = options.patience
        self._folder = tempfile.TemporaryDirectory(prefix="llmos-benchmark-")
        self._ranks: list[_Rank] = []

    def start(self) -> None:
        """Starts the processes and waits for their first steps."""
        if self.missing:
            return
        job, environment = self._job, kinds.environment(self._job.kind, self.devices)
        if self._count > 1:
            job = replace(job, rendezvous=str(Path(self._folder.name) / "rendezvous"))
        for rank in range(self._count):
            self._ranks.append(_Rank(json.dumps(asdict(replace(job, rank=rank))), environment))
        answers = self._answers()
        if answers:
            self.first = answers[0]

    def take_steps(self, count: int) -> None:
        """Takes steps, and waits for them.

        Args:
            count: how many.
        """
        if self.missing or self.error:
            return
        for rank in self._ranks:
            rank.tell(count)
        answers = self._answers()
        if answers:
            self.rounds.append(answers[0]["times"])
            self.peak_bytes = sum(answer["peak_bytes"] for answer in answers)

    @property
    def round_medians(self) -> list[float]:
        """Median step time of each round, seconds."""
        return [statistics.median(times) for times in self.rounds]

    def end(self) -> None:
        """Ends the processes, whatever they are doing, and those that they have started."""
        for rank in self._ranks:
            rank.kill()
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        self._folder.cleanup()

    def _answers(self) -> list[dict[str, Any]]:
        """An answer of each process; nothing, and an `error`, if one of them has none.

        All are listened to at once: one that has failed leaves the others waiting for it.
        """
        deadline = time.monotonic() + self._patience
        answers: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for index, rank in enumerate(self._ranks):
                selector.register(rank.stdout, selectors.EVENT_READ, index)
            while len(answers) < len(self._ranks) and self.error is None:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    self.error = (
                        f"it has not answered for {self._patience} s (--patience): too slow, or "
                        "its processes wait for each other"
                    )
                for key, _ in ready:
                    answer = self._ranks[key.data].read()
                    if answer is None:
                        continue
                    answers[key.data] = answer
                    selector.unregister(key.fileobj)
                    # The first word counts: the others only miss the one that failed.
                    self.error = self.error or answer.get("error")
        if self.error is not None:
            self.end()
            return []
        return [answers[index] for index in range(len(self._ranks))]


class _Rank:
    """One process."""

    def __init__(self, job: str, environment: dict[str, str]):
        # A file, which does not fill up while nobody reads it.
        self._stderr = tempfile.TemporaryFile("w+b")  # noqa: SIM115 (closed by `close`)
        self._line = b""
        self._process = subprocess.Popen(
            [*_WORKER, job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            # Ctrl-C reaches the benchmark alone, which then ends this one with all that it started.
            start_new_session=True,
        )
        self.stdout = self._process.stdout

    def tell(self, count: int) -> None:
        """Has it take steps. That it cannot any more is seen when its answer is read."""
        try:
            self._process.stdin.write(f"{count}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def read(self) -> dict[str, Any] | None:
        """Returns its answer, or None for a part of it. Called when there is something to read."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            return {"error": self._last_words()}
        self._line += data
        return json.loads(self._line_done()) if self._line.endswith(b"\n") else None

    def kill(self) -> None:
        """Ends it and what it started."""
        try:
            # Before `wait`, so that the number is still this process's.
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def close(self) -> None:
        """Waits for its end."""
        self._process.wait()
        self._process.stdout.close()
        self._stderr.close()
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            # What it was told when it had ended already.
            return

    def _line_done(self) -> bytes:
        line, self._line = self._line, b""
        return line

    def _last_words(self) -> str:
        self.kill()
        status = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        return f"it ended with {how}" + (f": {lines[-1]}" if lines else "")
