"""llmos-verify: does a model train on a mesh as it does on one device?

    llmos-verify --model=my_module:build --batches=my_module:batches
    llmos-verify --model=my_module:build --batches=my_module:batches \\
        --mesh=data=2 --mesh=fsdp=2,tensor=2 --steps=10 --json=out.json

build() makes and returns a compiled keras.Model, anew at each call. batches() yields global batches
(x, y) or (x, y, sample_weights) of numpy arrays, nested ones if need be; a last batch of fewer rows
shows more than even ones do. The current folder is looked in for the module. CPU devices are made
as the meshes need them; a GPU is used where there is one.

Everything is run for --steps steps on one device and on each mesh, in float64, and compared after
each step:

    gradients   one step of plain gradient descent: an adaptive optimizer hides a wrong factor
    weights     all weights, on each rank, with the model's own optimizer
    loss        and metrics: what each step reports
    storage     bytes of each variable on each device, against its layout
    dropout     masks differ where rows do and only there; other rows are run with rates of 0

For what differs it names the first step and the first variable, and where to look. Exit status 0
when all agrees, 1 when something differs or a run fails, 2 for what cannot be run.
"""

from llmos_tf.scripts.checked import verify_options
from llmos_tf.scripts.program import Program

PROGRAM = Program(
    doc=__doc__,
    flags=(
        "model",
        "batches",
        "mesh",
        "zero_stage",
        "sequence_parallel",
        "microbatches",
        "schedule",
        "num_chunks",
        "context_method",
        "layout_map",
        "steps",
        "dtype",
        "tolerance",
        "virtual_devices",
        "seed",
        "json",
    ),
    options=verify_options,
    work="llmos_tf.scripts.programs.verify",
    help={
        "mesh": "Mesh axes, such as data=2,tensor=4. Repeat the flag for each mesh; by default "
        "data=2 and fsdp=2.",
        "microbatches": "Microbatches of a batch on the pipe axis; by default one per stage.",
        "steps": "Steps to run on one device and on each mesh; by default 5.",
        "virtual_devices": "Virtual CPU devices to create; by default those of the largest mesh.",
        "dtype": "Dtype policy of all runs; by default float64.",
    },
)


def run() -> None:
    """Entry point of llmos-verify."""
    PROGRAM.run()


if __name__ == "__main__":
    run()
