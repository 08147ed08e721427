"""llmos-plan: what a pipeline schedule looks like and costs, before anything is run.

    llmos-plan --draw_schedule=1f1b
    llmos-plan --draw_schedule=zb-v --stages=4 --microbatches=8 --png=zb-v.png
    llmos-plan --draw_schedule=interleaved --stages=4 --microbatches=8 --num_chunks=2

It prints a row for each stage and a column for each tick, the bubble (what the stage with the
longest span waits in it) with the published formula, the activations that each stage holds at most,
and the time of a step when forward, gradient of inputs and gradient of weights take a stage 1 each.
The same is left as a PNG, to scale. Schedules: gpipe, 1f1b, interleaved, zb-h1, zb-v.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

from llmos_tf.planning import draw_png, draw_text, published_bubble, simulate, text_legend
from llmos_tf.scripts.flags import plan_options_from_flags, refuse, refusing_misuse, start
from llmos_tf.strategies.schedules import Schedule, make_schedule

_FLAGS = ("draw_schedule", "stages", "microbatches", "num_chunks", "png", "json")
_WIDTH = 100


def main() -> int:
    """Draws and prints."""
    with refusing_misuse():
        options = plan_options_from_flags()
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
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        refuse(f"The picture or the JSON cannot be written: {error}. Give another --png or --json.")
    _print(schedule, result)
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
