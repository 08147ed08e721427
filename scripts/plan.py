"""llmos-plan: what a run takes and a pipeline schedule looks like, before anything is run.

    llmos-plan --preset=llama2_7b --mesh=fsdp=8,tensor=2 --zero_stage=3 --global_batch=64
    llmos-plan --draw_schedule=1f1b
    llmos-plan --draw_schedule=zb-v --stages=4 --microbatches=8 --png=zb-v.png
    llmos-plan --draw_schedule=interleaved --stages=4 --microbatches=8 --num_chunks=2

With --mesh it prints what each device holds at the fullest moment of a step with AdamW in float32:
parameters, gradients, optimizer state, activations, communication, and copies of weights; with
--offload also what lies on the host for each.

With --draw_schedule it prints a row for each stage and a column for each tick, the bubble (what the
stage with the longest span waits in it) with the published formula, the activations that each stage
holds at most, and the time of a step when forward, gradient of inputs and gradient of weights take
a stage 1 each. The same is left as a PNG, to scale. Schedules: gpipe, 1f1b, interleaved, zb-h1,
zb-v.
"""

import textwrap
from pathlib import Path
from typing import Any

from llmos_tf import memory
from llmos_tf.files.writing import write_json
from llmos_tf.mesh import Mesh
from llmos_tf.models.presets import get_preset
from llmos_tf.planning import draw_png, draw_text, published_bubble, simulate, text_legend
from llmos_tf.planning.memory_model import HOST, KINDS
from llmos_tf.planning.schedules import Schedule, make_schedule
from llmos_tf.scripts.flags import FLAGS, plan_options_from_flags, refuse, refusing_misuse, start
from llmos_tf.scripts.options import PlanOptions

_FLAGS = (
    "preset",
    "mesh",
    "global_batch",
    "seq_len",
    "zero_stage",
    "sequence_parallel",
    "context_method",
    "rematerialise",
    "offload",
    "schedule",
    "draw_schedule",
    "stages",
    "microbatches",
    "num_chunks",
    "png",
    "json",
)
_WIDTH = 100


def main() -> int:
    """Draws and prints."""
    with refusing_misuse():
        options = plan_options_from_flags()
        if not options.draw_schedule:
            return _plan_memory(options)
        schedule = options.schedule()
    result = _figures(schedule)
    png = Path(
        options.png
        or f"schedule-{schedule.name}-{schedule.num_stages}x{schedule.num_microbatches}.png"
    )
    result["png"] = str(png)
    try:
        draw_png(schedule, png)
        if options.json:
            write_json(options.json, result)
    except OSError as error:
        refuse(f"The picture or the JSON cannot be written: {error}. Give another --png or --json.")
    _print(schedule, result)
    return 0


def _plan_memory(options: PlanOptions) -> int:
    """Prints the memory of each kind of device: those of a stage of the pipeline are alike."""
    run, mesh = options.run_options(FLAGS.schedule), Mesh.from_string(options.mesh)
    rows = memory.estimate(get_preset(options.preset), mesh, **run)
    by_stage = {mesh.coordinate(rank)["pipe"]: row for rank, row in enumerate(rows)}
    stages = [{kind: row[kind] for kind in (*KINDS, HOST)} for row in by_stage.values()]
    names = ["each device"] if len(stages) == 1 else [f"stage {i}" for i in range(len(stages))]
    print(f"{options.preset} on {mesh}, {options.global_batch} rows a step, bytes of a device:\n")
    width = max(map(len, KINDS)) + 1
    print(" " * width + "".join(f"{name:>16}" for name in names))
    for kind in KINDS:
        print(f"{kind:{width}}" + "".join(f"{row[kind]:16,}" for row in stages))
    totals = [sum(row[kind] for kind in KINDS) for row in stages]
    print(f"{'total':{width}}" + "".join(f"{total:16,}" for total in totals))
    if options.offload:
        print(f"{'on the host':{width}}" + "".join(f"{row[HOST]:16,}" for row in stages))
    if options.json:
        result = {"preset": options.preset, "mesh": str(mesh), **run, "stages": stages}
        write_json(options.json, result)
    return 0


def _figures(schedule: Schedule) -> dict[str, Any]:
    bubble = published_bubble(schedule)
    stages, microbatches = schedule.num_stages, schedule.num_microbatches
    return {
        "schedule": schedule.name,
        "stages": stages,
        "microbatches": microbatches,
        "num_chunks": schedule.num_chunks,
        "bubble_share": schedule.bubble_share,
        "bubble_formula": bubble.formula,
        "bubble_share_by_formula": bubble.share,
        "peak_live_activations": list(schedule.peak_live_activations),
        "step_time": simulate(schedule).total_time,
        "step_time_1f1b": simulate(make_schedule("1f1b", stages, microbatches)).total_time,
        "step_time_without_waiting": 3.0 * microbatches,
        "rows": [[op and list(op) for op in row] for row in schedule.rows],
    }


def _print(schedule: Schedule, result: dict[str, Any]) -> None:
    chunks = schedule.num_chunks
    many = (
        ""
        if chunks == 1
        else f", {chunks} chunks on a stage: a model of {schedule.num_parts} parts"
    )
    print(
        f"{schedule.name}: {schedule.num_stages} stages, "
        f"{schedule.num_microbatches} microbatches{many}\n"
    )
    print(f"{draw_text(schedule, _WIDTH)}\n")
    _print_wrapped(text_legend(schedule))
    print()
    with_values = f"p={schedule.num_stages}, m={schedule.num_microbatches}" + f", v={chunks}" * (
        chunks > 1
    )
    _print_wrapped(
        f"bubble: {result['bubble_share']:.2%} of the longest span of a stage; by formula "
        f"{result['bubble_share_by_formula']:.2%}: {result['bubble_formula']} with {with_values}"
    )
    unit = "stage" if chunks == 1 else f"part (1/{chunks} of a stage)"
    _print_wrapped(
        f"peak activations of stages 0 to {schedule.num_stages - 1}, in those of one microbatch in "
        f"one {unit}: {', '.join(map(str, schedule.peak_live_activations))}"
    )
    _print_wrapped(
        f"step: {result['step_time']:g} where each of forward, gradient of inputs and gradient of "
        f"weights takes a stage 1 (1f1b {result['step_time_1f1b']:g}, without any waiting "
        f"{result['step_time_without_waiting']:g})"
    )
    print(f"picture: {result['png']}")


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, _WIDTH, subsequent_indent="    ", break_on_hyphens=False))


def run() -> None:
    """Entry point of llmos-plan."""
    start(main, _FLAGS)


if __name__ == "__main__":
    run()
