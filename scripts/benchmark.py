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

from llmos_tf.scripts.checked import benchmark_options
from llmos_tf.scripts.peers import kinds
from llmos_tf.scripts.program import Program

_LIST = "\n".join(f"    {kinds.form(name):30} {kind.summary}" for name, kind in kinds.KINDS.items())

PROGRAM = Program(
    doc=__doc__.replace("KINDS\n", f"{_LIST}\n\n"),
    flags=(
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
    ),
    options=benchmark_options,
    work="llmos_tf.scripts.programs.benchmark",
    help={
        "png": "File of a picture; by default none is drawn.",
        "seq_len": "Tokens in a sequence; by default 128.",
        "seed": "Seed of weights and batch.",
    },
)


def run() -> None:
    """Entry point of llmos-benchmark."""
    PROGRAM.run()


if __name__ == "__main__":
    run()
