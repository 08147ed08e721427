"""llmos-benchmark: step times of meshes against each other, on one model.

    llmos-benchmark --run=1 --run=pipe=2:microbatches=8 --threads_per_device=1
    llmos-benchmark --run=1 --run=data=2 --run=tensor=2 --num_layers=4 --rounds=5 --json=out.json

A run is a mesh, 1 for one device, with what MeshStrategy takes besides: MESH:name=value,... of
schedule, microbatches, num_chunks, zero_stage, context_method and sequence_parallel. Each has a
process of its own, and they take turns: in each round every run does some steps while the others
rest, so that what else the machine does meets all of them. Ratios are to the first run, round by
round. The model is a GPT on 128 tokens, the optimizer AdamW, everything float32.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tqdm

from llmos_tf.scripts.flags import benchmark_options_from_flags, refusing_misuse, start
from llmos_tf.scripts.options import BenchmarkOptions, Candidate
from llmos_tf.training.reporting import bar_interval

_FLAGS = (
    "run",
    "rounds",
    "steps_in_round",
    "threads_per_device",
    "vocab_size",
    "hidden_size",
    "num_heads",
    "num_layers",
    "seq_len",
    "global_batch",
    "seed",
    "json",
)


def main() -> int:
    """Runs, and prints a table."""
    with refusing_misuse():
        options = benchmark_options_from_flags()
    workers = []
    try:
        for candidate in tqdm.tqdm(options.candidates, "first steps", mininterval=bar_interval()):
            workers.append(_Worker(options, candidate))
        for _ in tqdm.trange(options.rounds, desc="rounds", mininterval=bar_interval()):
            for worker in workers:
                worker.take_steps(options.steps_in_round)
    finally:
        for worker in workers:
            worker.end()
    rows = [_row(worker, workers[0], options) for worker in workers]
    print(_table(rows))
    if options.json:
        result = {"options": asdict(options), "rows": rows}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if any("error" in row for row in rows) else 0


class _Worker:
    """The process of one run."""

    def __init__(self, options: BenchmarkOptions, candidate: Candidate):
        self.name = candidate.text
        self.rounds: list[list[float]] = []
        self.first: dict[str, Any] = {}
        self.peak_bytes = 0
        self.error: str | None = None
        job = options.job(candidate)
        command = [sys.executable, "-m", "llmos_tf.scripts.benchmark_worker", json.dumps(job)]
        pipe = subprocess.PIPE
        # A file, which does not fill up while nobody reads it.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True
        )
        self.first = self._answer() or {}

    def take_steps(self, count: int) -> None:
        """Takes steps, and waits for them."""
        if self.error is None:
            self._process.stdin.write(f"{count}\n")
            self._process.stdin.flush()
            answer = self._answer()
            if answer is not None:
                self.rounds.append(answer["times"])
                self.peak_bytes = answer["peak_bytes"]

    def end(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any] | None:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        self.error = lines[-1] if lines else "it ended without a word"
        return None


def _row(worker: _Worker, base: _Worker, options: BenchmarkOptions) -> dict[str, Any]:
    if worker.error is not None:
        return {"run": worker.name, "error": worker.error}
    times = [time for times in worker.rounds for time in times]
    median = statistics.median(times)
    row = {
        "run": worker.name,
        "median_seconds": median,
        "min_seconds": min(times),
        "max_seconds": max(times),
        "tokens_per_second": options.global_batch * options.seq_len / median,
        "first_step_seconds": worker.first["first_step"],
        "peak_bytes": worker.peak_bytes,
        "loss": worker.first["loss"],
    }
    if base.error is None:
        pairs = zip(worker.rounds, base.rounds, strict=True)
        ratios = [statistics.median(mine) / statistics.median(its) for mine, its in pairs]
        row["ratio"] = statistics.median(ratios)
        row["ratios"] = ratios
    return row


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| run | step, median s | min | max | ratio | its rounds | tokens/s | first step, s | "
        "peak MB | first loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['run']} | failed: {row['error']} |" + " |" * 8)
            continue
        ratios = row.get("ratios")
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        lines.append(
            f"| {row['run']} | {row['median_seconds']:.3f} | {row['min_seconds']:.3f} | "
            f"{row['max_seconds']:.3f} | {row.get('ratio', float('nan')):.3f} | {spread} | "
            f"{row['tokens_per_second']:,.0f} | {row['first_step_seconds']:.1f} | "
            f"{row['peak_bytes'] / 2**20:,.0f} | {row['loss']:.4f} |"
        )
    return "\n".join(lines)


def run() -> None:
    """Entry point of llmos-benchmark."""
    start(main, _FLAGS)


if __name__ == "__main__":
    run()
