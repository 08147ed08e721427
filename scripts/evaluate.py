"""llmos-evaluate: bits per byte of a checkpoint on held-out text.

    llmos-evaluate --checkpoint=llmos_runs/my_run
    llmos-evaluate --checkpoint=llmos_runs/my_run --mesh=tensor=2 --data='text/*.txt'

Tokenizer, sequence length, batch, mesh and text are those of the training run, as the checkpoint
records them. Any other mesh gives the same result. The text is the held-out part, split as in
training; for another text give --data.
"""

from llmos_tf.scripts.program import Program
from llmos_tf.scripts.settings import evaluate_options

PROGRAM = Program(
    doc=__doc__,
    flags=(
        "checkpoint",
        "workdir",
        "mesh",
        "zero_stage",
        "sequence_parallel",
        "microbatches",
        "context_method",
        "virtual_devices",
        "global_batch",
        "seq_len",
        "data",
        "tokenizer",
        "seed",
        "json",
    ),
    options=evaluate_options,
    work="llmos_tf.scripts.programs.evaluate",
    help={
        "workdir": "The same as --checkpoint.",
        "mesh": "Mesh axes, such as data=2,tensor=4; 1 for one device. By default those of the "
        "training run, with its other options of the mesh.",
        "global_batch": "Sequences in a step, over all devices; by default as in the training run. "
        "It changes speed and memory only.",
        "seq_len": "Tokens in a sequence, as in the training run.",
        "data": "Corpus: stdlib, or a glob of text or .jsonl files; by default that of the "
        "training run.",
        "tokenizer": "Path of the tokenizer.json of the training run, if the recorded one is gone.",
    },
)


def run() -> None:
    """Entry point of llmos-evaluate."""
    PROGRAM.run()


if __name__ == "__main__":
    run()
