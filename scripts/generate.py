"""llmos-generate: continues a text with a checkpoint.

    llmos-generate --checkpoint=llmos_runs/my_run --prompt='def main('
    llmos-generate --checkpoint=llmos_runs/my_run --prompt='import ' --temperature=0 --mesh=tensor=2

Tokenizer and mesh are those of the training run, as the checkpoint records them. Any other mesh
gives the same text for the same --seed. --temperature=0 always takes the likeliest token. Control
characters are printed escaped, as \\x1b: a terminal would obey them. --raw prints them as they are.
"""

from llmos_tf.scripts.program import Program
from llmos_tf.scripts.settings import generate_options

PROGRAM = Program(
    doc=__doc__,
    flags=(
        "checkpoint",
        "workdir",
        "prompt",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "raw",
        "mesh",
        "zero_stage",
        "virtual_devices",
        "tokenizer",
        "seed",
        "json",
    ),
    options=generate_options,
    work="llmos_tf.scripts.programs.generate",
    help={
        "workdir": "The same as --checkpoint.",
        "mesh": "Mesh axes, such as data=2,tensor=4; 1 for one device. By default those of the "
        "training run, with its other options of the mesh.",
        "tokenizer": "Path of the tokenizer.json of the training run, if the recorded one is gone.",
        "seed": "Seed of the sampling; by default 0.",
    },
)


def run() -> None:
    """Entry point of llmos-generate."""
    PROGRAM.run()


if __name__ == "__main__":
    run()
