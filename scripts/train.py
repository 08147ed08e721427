"""llmos-train: trains a language model over a mesh of devices.

With no flags it trains gpt_tiny, a GPT of 0.8 million parameters, on the source text of Python's
standard library, over data=2,tensor=2 on four virtual CPU devices, in a few minutes. It shows loss,
speed and time left, and leaves in the folder of the run: checkpoints/, metrics.jsonl, tensorboard/,
curves.png and summary.json. Ctrl-C (or SIGTERM) saves a checkpoint and ends.

    llmos-train
    llmos-train --preset=gpt2_small --mesh=fsdp=8 --data='text/*.jsonl' --tokenizer=tokenizer.json
    llmos-train --workdir=my_run --resume

--resume continues bit for bit, with the settings that the checkpoint records; without --workdir it
continues the newest run in llmos_runs/. Mesh, --steps and --learning_rate may change: the run then
is no longer bit for bit the one that was interrupted. Text, model and batch may not.
"""

from llmos_tf.scripts.options import OF_THE_MESH
from llmos_tf.scripts.program import Program
from llmos_tf.scripts.settings import train_options

PROGRAM = Program(
    doc=__doc__,
    flags=(
        "preset",
        "mesh",
        *OF_THE_MESH,
        "global_batch",
        "seq_len",
        "steps",
        "learning_rate",
        "data",
        "tokenizer",
        "workdir",
        "resume",
        "save_every",
        "seed",
        "json",
    ),
    options=train_options,
    work="llmos_tf.scripts.programs.train",
    help={
        "resume": "Continue a run from its newest whole checkpoint, with the settings it records.",
        "steps": "Steps in total, counted from the first start of the run; by default 900.",
        "seed": "Seed of weights, data order, dropout and the sample; by default 0.",
    },
)


def run() -> None:
    """Entry point of llmos-train."""
    PROGRAM.run()


if __name__ == "__main__":
    run()
