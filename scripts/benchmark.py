"""llmos-benchmark: step times of our meshes and of other frameworks, on one model.

    llmos-benchmark --run=1 --run=data=2 --run=pipe=2:microbatches=8 --threads_per_device=1
    llmos-benchmark --run=fit:1 --run=keras --run=keras:jit --rounds=5
    llmos-benchmark --run=data=4 --run=mirrored=4 --run=torch-ddp=4 --json=out.json --png=out.png
    llmos-benchmark --run=1 --run=1

A run is a mesh, 1 for one device, with what MeshStrategy takes besides: MESH:name=value,... of
schedule, microbatches, num_chunks, zero_stage, context_method, sequence_parallel, rematerialise,
bucket_bytes, gradient_compression, powersgd_rank, reshard_after_forward and offload. It is timed
by the bare train step; fit:MESH:... by model.fit, as the runs of Keras are. The others are:

KINDS
N is a number of devices, or of processes with PyTorch. What is not installed, by
pip install '.[bench]', has a row that says so.

Each run has a process of its own, or several, and they take turns: in each round every run does
some steps while the others rest, so that what else the machine does meets all of them. Ratios are
to the first run, round by round, and by --ratio between any two. What is left of a difference
between a run and itself (the last example) is noise, and so is what its rounds differ by.

All train the same GPT of 128 tokens in float32 with AdamW, from the same weights and on the same
batch: the first loss and the one after 5 steps are the same, or the times cannot be compared. Exit
status 1 when a run fails, or none is left; one whose framework is not installed does not count.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
import tqdm

from llmos_tf.files.writing import write_json
from llmos_tf.scripts import benchmark_report
from llmos_tf.scripts.benchmark_options import BenchmarkOptions
from llmos_tf.scripts.benchmark_process import RunProcesses
from llmos_tf.scripts.flags import benchmark_options_from_flags, refusing_misuse, start
from llmos_tf.scripts.peers import kinds
from llmos_tf.training.flops import peak_flops
from llmos_tf.training.reporting import bar_interval

_FLAGS = (
    "run",
    "ratio",
    "rounds",
    "steps_in_round",
    "threads_per_device",
    "patience",
    "vocab_size",
    "hidden_size",
    "num_heads",
    "num_layers",
    "seq_len",
    "global_batch",
    "seed",
    "json",
    "png",
)

_LIST = "\n".join(f"    {kinds.form(name):30} {kind.summary}" for name, kind in kinds.KINDS.items())
__doc__ = __doc__.replace("KINDS\n", f"{_LIST}\n\n")


def main() -> int:
    """Runs, and prints tables."""
    with refusing_misuse():
        options = benchmark_options_from_flags()
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
        write_json(options.json, result)
    if options.png:
        config = options.workload.config
        title = (
            f"GPT of {config.num_parameters():,} parameters, {options.global_batch} × "
            f"{options.seq_len} tokens a step, float32, {options.rounds} rounds"
        )
        benchmark_report.draw(rows, Path(options.png), title)


def run() -> None:
    """Entry point of llmos-benchmark."""
    start(main, _FLAGS)


if __name__ == "__main__":
    run()
