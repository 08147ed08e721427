"""The work of llmos-plan: `scripts.plan` has its help and flags. No TensorFlow."""

import json
import textwrap
from pathlib import Path
from typing import Any

from llmos_tf.config import ModelConfig
from llmos_tf.planning import draw_png, draw_text, published_bubble, simulate, text_legend
from llmos_tf.planning.memory_model import HOST, KINDS
from llmos_tf.planning.schedules import Schedule, make_schedule
from llmos_tf.scripts.checks import zero_note
from llmos_tf.scripts.plan_options import PlanOptions
from llmos_tf.scripts.program import refuse, refusing_misuse
from llmos_tf.scripts.programs.fitting import (
    ALLOCATOR_SHARE,
    changes_that_fit,
    memory_by_stage,
    needed,
)

_WIDTH = 100


def main(options: PlanOptions) -> int:
    """Draws and prints.

    Args:
        options: of the program.

    Returns:
        Exit status 0.
    """
    try:
        if options.draw_schedule:
            _draw_schedule(options)
        else:
            _plan_memory(options)
    except OSError as error:
        refuse(f"A file cannot be written: {error}. Give another --png or --json.")
    return 0


def _draw_schedule(options: PlanOptions) -> None:
    with refusing_misuse():
        schedule = options.drawn_schedule()
    result = _figures(schedule)
    png = Path(
        options.png
        or f"schedule-{schedule.name}-{schedule.num_stages}x{schedule.num_microbatches}.png"
    )
    result["png"] = str(png)
    draw_png(schedule, png)
    _write(options, result)
    _print_schedule(schedule, result)


def _write(options: PlanOptions, result: dict[str, Any]) -> None:
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


# --- memory ---------------------------------------------------------------------------------------


def _plan_memory(options: PlanOptions) -> None:
    """Prints the memory of each kind of device: those of a stage of the pipeline are alike."""
    with refusing_misuse():
        plan = options.plan()
        stages = memory_by_stage(options)
    _print_run(options, plan.config, plan.seq_len)
    _print_table(options, stages)
    result = {
        **options.to_dict(),
        "mesh": str(plan.mesh),
        "seq_len": plan.seq_len,
        "parameters": plan.config.num_parameters(),
        "stages": stages,
    }
    if options.device_bytes is not None:
        result |= _print_verdict(options, options.device_bytes)
    _write(options, result)


def _print_run(options: PlanOptions, config: ModelConfig, seq_len: int) -> None:
    mesh = options.parsed_mesh
    of_pipe = ""
    if mesh.axis_size("pipe") > 1:
        microbatches = options.microbatches or mesh.axis_size("pipe")
        of_pipe = f", {microbatches} microbatches in the order {options.schedule}"
    _print_wrapped(
        f"{options.preset}: {config.num_parameters():,} parameters on a mesh of {mesh.size} "
        f"device{'s' * (mesh.size > 1)} ({mesh})"
    )
    _print_wrapped(
        f"A step: {options.global_batch:,} sequences of {seq_len:,} tokens{of_pipe}, AdamW, "
        f"{options.dtype}" + (", weights in float32" if options.dtype != "float32" else "")
    )
    note = zero_note(options.zero_stage, mesh)
    if note:
        _print_wrapped(note)


def _print_table(options: PlanOptions, stages: list[dict[str, int]]) -> None:
    totals = [sum(row[kind] for kind in KINDS) for row in stages]
    unit, size = _unit(max(totals))
    names = ["each device"] if len(stages) == 1 else [f"stage {i}" for i in range(len(stages))]
    width = max(map(len, (*KINDS, "on the host"))) + 1
    print(f"\nMemory of a device at the fullest moment of a step, in {unit}:\n")
    print(" " * width + "".join(f"{name:>14}" for name in names))
    for kind in KINDS:
        print(f"{kind:{width}}" + "".join(f"{row[kind] / size:14,.2f}" for row in stages))
    print(f"{'total':{width}}" + "".join(f"{total / size:14,.2f}" for total in totals))
    if options.offload:
        hosts = "".join(f"{row[HOST] / size:14,.2f}" for row in stages)
        print(f"{'on the host':{width}}{hosts}")


def _print_verdict(options: PlanOptions, room: int) -> dict[str, Any]:
    """Prints whether a device has the room, and else what would make it fit."""
    total = needed(options)
    fits = total <= room
    print()
    _print_wrapped(
        f"{'Fits' if fits else 'Does not fit'}: a device of {options.device_memory} has "
        f"{_bytes(room)}, and {_bytes(total)} are needed, with {ALLOCATOR_SHARE:.0%} for what an "
        "allocator loses."
    )
    found = [] if fits else changes_that_fit(options, room)
    if found:
        by_itself = ", each line by itself" if len(found) > 1 else ""
        print(f"What would make it fit{by_itself}:")
        for changed, bytes_needed in found:
            print(f"  {changed:{max(len(text) for text, _ in found)}}  {_bytes(bytes_needed):>9}")
    elif not fits:
        print("No change of flags that llmos-plan tries makes it fit.")
    return {"device_bytes": room, "needed_bytes": total, "fits": fits, "changes": found}


def _unit(largest: int) -> tuple[str, int]:
    """The unit of a table: GB, and smaller ones for models that would be 0.00 GB."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    return next((item for item in units.items() if largest >= item[1] / 10), ("KB", 10**3))


def _bytes(count: int) -> str:
    unit, size = _unit(count)
    return f"{count / size:,.2f} {unit}"


# --- schedules ------------------------------------------------------------------------------------


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


def _print_schedule(schedule: Schedule, result: dict[str, Any]) -> None:
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
