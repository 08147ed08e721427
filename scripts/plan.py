"""llmos-plan: memory of a run and pictures of pipeline schedules, before anything is run.

    llmos-plan --preset=llama2_7b --mesh=fsdp=8,tensor=2 --global_batch=64 --seq_len=512
    llmos-plan --preset=llama2_7b --mesh=fsdp=8 --dtype=mixed_bfloat16 --device_memory=80GB
    llmos-plan --draw_schedule=1f1b
    llmos-plan --draw_schedule=zb-v --stages=4 --microbatches=8 --png=zb-v.png
    llmos-plan --draw_schedule=interleaved --stages=4 --microbatches=8 --num_chunks=2

With --mesh it prints the memory of each device at the fullest moment of a step with AdamW and
weights in float32: parameters, gradients, optimizer state, activations, communication, and copies
of weights; with --offload also what is stored on the host for each. With --device_memory it reports
whether that fits, and which flags would make it fit.

With --draw_schedule it prints a row for each stage and a column for each tick, the bubble (idle
share of the stage with the longest span) with the published formula, the activations that each
stage holds at most, and the time of a step when forward, gradient of inputs and gradient of weights
take a stage 1 each. The same is drawn as a PNG, to scale. Schedules: gpipe, 1f1b, interleaved,
zb-h1, zb-v.
"""

from llmos_tf.scripts.checked import plan_options
from llmos_tf.scripts.program import Program

PROGRAM = Program(
    doc=__doc__,
    flags=(
        "preset",
        "mesh",
        "global_batch",
        "seq_len",
        "dtype",
        "device_memory",
        "zero_stage",
        "sequence_parallel",
        "context_method",
        "rematerialise",
        "offload",
        "reshard_after_forward",
        "schedule",
        "draw_schedule",
        "stages",
        "microbatches",
        "num_chunks",
        "png",
        "json",
    ),
    options=plan_options,
    work="llmos_tf.scripts.programs.plan",
    help={
        "mesh": "Mesh axes, such as data=2,tensor=4; 1 for one device. The devices need not exist.",
        "dtype": "Dtype policy of Keras: float32, mixed_bfloat16 or mixed_float16. Weights are "
        "float32 with each; by default float32.",
        "rematerialise": "Activations that the backward pass recomputes instead of keeping them: "
        "none, full, block or selective; by default none.",
        "microbatches": "Microbatches of a batch on the pipe axis; by default one per stage, and "
        "two per stage in a picture.",
        "png": "File of the picture; by default schedule-<name>-<stages>x<microbatches>.png in the "
        "current folder.",
    },
    computes=False,
)


def run() -> None:
    """Entry point of llmos-plan."""
    PROGRAM.run()


if __name__ == "__main__":
    run()
