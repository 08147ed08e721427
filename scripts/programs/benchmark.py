"""The work of llmos-benchmark: `scripts.benchmark` has its help and flags."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
import tqdm

from llmos_tf.scripts import benchmark_report
from llmos_tf.scripts.benchmark_options import BenchmarkOptions
from llmos_tf.scripts.benchmark_process import RunProcesses
from llmos_tf.training.flops import peak_flops
from llmos_tf.training.reporting import bar_interval


def main(options: BenchmarkOptions) -> int:
    """Runs, and prints tables.

    Args:
        options: of the program.

    Returns:
        Exit status: 1 where a run has failed, or none is left.
    """
    runs = [RunProcesses(options, candidate) for candidate in options.candidates]
    try:
        with _ended(runs):
            for run in tqdm.tqdm(runs, "first steps", mininterval=bar_interval()):
                run.start()
            for _ in tqdm.trange(options.rounds, desc="rounds", mininterval=bar_interval()):
                for run in runs:
                    run.take_steps(options.steps_in_round)
    except KeyboardInterrupt:
        print("Stopped. All runs are ended.", file=sys.stderr)
        return 130
    rows = benchmark_report.make_rows(runs, options, _peak_of_a_gpu())
    pairs = benchmark_report.pair_rows(rows, options.pairs)
    print(benchmark_report.table(rows))
    for line in benchmark_report.disagreements(rows):
        print(f"\n{line}")
    if pairs:
        print(f"\n{benchmark_report.pair_table(pairs)}")
    _write(options, rows, pairs)
    failed = any("error" in row for row in rows)
    return 1 if failed or all("missing" in row for row in rows) else 0


@contextlib.contextmanager
def _ended(runs: list[RunProcesses]) -> Iterator[None]:
    """Leaves no process behind."""
    try:
        yield
    finally:
        for run in runs:
            run.end()


def _peak_of_a_gpu() -> float | None:
    """FLOP/s, or None without a GPU. When the runs have ended: it may have to measure."""
    gpus = tf.config.list_physical_devices("GPU")
    return peak_flops(("GPU:0",))[0] if gpus else None


def _write(
    options: BenchmarkOptions, rows: list[dict[str, Any]], pairs: list[dict[str, Any]]
) -> None:
    if options.json:
        result = {
            "options": options.to_dict(),
            "rows": rows,
            "pairs": pairs,
            "ratios": benchmark_report.all_ratios(rows),
        }
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.png:
        config = options.workload.config
        title = (
            f"GPT of {config.num_parameters():,} parameters, {options.global_batch} × "
            f"{options.seq_len} tokens a step, float32, {options.rounds} rounds"
        )
        benchmark_report.draw(rows, Path(options.png), title)
