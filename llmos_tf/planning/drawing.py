"""Pictures of a pipeline schedule: as text, a column a tick, and as a PNG, to scale of time."""

from pathlib import Path

import matplotlib.axes
import matplotlib.colors
import matplotlib.figure
import matplotlib.patches

from llmos_tf.files.pictures import write_png
from llmos_tf.planning.bubbles import published_bubble
from llmos_tf.planning.schedules import Op, Schedule
from llmos_tf.planning.simulation import Timeline, simulate

# Blocks of lines at each end of a text picture that is too long to be shown whole.
_BLOCKS = 3
_WAIT = "·"
_COLOURS = {"F": "#1f5fa8", "B": "#1b8a5a", "W": "#d9822b"}
_WAITS = "#ececec"
# Points of the smallest number that can be read.
_SMALLEST = 4


def kind_names(schedule: Schedule) -> dict[str, str]:
    """Returns what the letters of a schedule's ops stand for.

    Args:
        schedule: the schedule.

    Returns:
        Kind to words.
    """
    if schedule.splits_backward:
        return {"F": "forward", "B": "gradient of inputs", "W": "gradient of weights"}
    return {"F": "forward", "B": "backward"}


def draw_text(schedule: Schedule, width: int = 100) -> str:
    """Draws a schedule as lines of text: a row a stage, a column a tick.

    Args:
        schedule: what to draw.
        width: columns of a line; more ticks go on below, and from the middle of a very long
            schedule they are left out.

    Returns:
        Lines, without a line break at the end.

    Example:
        >>> print(draw_text(make_schedule("1f1b", 2, 2)))
        tick     0  1  2  3  4  5
        stage 0  F0 F1 ·  B0 ·  B1
        stage 1  ·  F0 B0 F1 B1 ·
    """
    rows = [["" if op is None else _cell(schedule, op) for op in row] for row in schedule.rows]
    cell = max(2, len(str(len(rows) - 1)), *(len(text) for row in rows for text in row))
    label = len(f"stage {schedule.num_stages - 1}")
    fit = max(1, (width - label - 1) // (cell + 1))
    starts = list(range(0, len(rows), fit))
    blocks = []
    for index, start in enumerate(starts):
        if len(starts) > 2 * _BLOCKS and _BLOCKS <= index < len(starts) - _BLOCKS:
            if index == _BLOCKS:
                blocks.append(f"... ticks {start} to {starts[-_BLOCKS] - 1} ...")
            continue
        part = rows[start : start + fit]
        ticks = [str(start + offset) for offset in range(len(part))]
        lines = [_line("tick", label, ticks, cell)]
        for stage in range(schedule.num_stages):
            cells = [row[stage] or _WAIT for row in part]
            lines.append(_line(f"stage {stage}", label, cells, cell))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def text_legend(schedule: Schedule) -> str:
    """Returns what the cells of `draw_text` mean.

    Args:
        schedule: that was drawn.

    Returns:
        One line.
    """
    kinds = [f"{kind} {words}" for kind, words in kind_names(schedule).items()]
    if schedule.num_chunks == 2:
        kinds.append("small letters: the second chunk")
    elif schedule.num_chunks > 2:
        kinds.append("a, b, c: the chunk")
    return f"{', '.join(kinds)}; number: microbatch; {_WAIT} waits"


def draw_png(schedule: Schedule, path: Path) -> None:
    """Draws a schedule to scale, with forward, B and W of a stage taking the same time.

    Args:
        schedule: what to draw.
        path: of the picture.

    Raises:
        OSError: it cannot be written, as on a full disk; the error names it.
    """  # noqa: DOC502
    timeline = simulate(schedule)
    stages = range(schedule.num_stages)
    width = min(max(9.0, 0.32 * timeline.total_time + 2), 40)
    figure = matplotlib.figure.Figure(
        figsize=(width, 1.9 + 0.42 * schedule.num_stages), layout="constrained"
    )
    axes = figure.subplots()
    # 2 inches are for the names at both ends.
    _draw_ops(axes, schedule, timeline, (width - 2) / timeline.total_time)
    axes.set(xlim=(0, timeline.total_time), ylim=(schedule.num_stages - 0.5, -0.5))
    axes.set_xlabel(
        "time, in forward passes of a stage; live: most activations held, in those of "
        + ("a stage" if schedule.num_chunks == 1 else "a chunk")
    )
    axes.set_yticks(stages, [f"stage {stage}" for stage in stages])
    right = axes.secondary_yaxis("right")
    right.set_yticks(stages, [f"{peak} live" for peak in schedule.peak_live_activations])
    for each in (axes, right):
        each.tick_params(axis="y", length=0)
        for spine in each.spines.values():
            spine.set_visible(False)
    axes.set_title(_title(schedule, timeline.total_time), loc="left", fontsize=11)
    figure.legend(
        handles=_handles(schedule), loc="outside lower center", ncols=7, frameon=False, fontsize=9
    )
    write_png(path, figure, dpi=150)


def _draw_ops(
    axes: matplotlib.axes.Axes, schedule: Schedule, timeline: Timeline, inches: float
) -> None:
    """Draws a bar for each op, with its microbatch where there is room in the shortest one."""
    digits = len(str(schedule.num_microbatches - 1))
    points = min(9.0, inches * 72 / schedule.num_chunks / (0.75 * digits))
    for stage in range(schedule.num_stages):
        order = schedule.order(stage)
        times = list(zip(timeline.starts[stage], timeline.ends[stage], strict=True))
        colours = [_colour(op, schedule.num_chunks) for op in order]
        axes.barh(stage, timeline.total_time, height=0.86, color=_WAITS)
        axes.broken_barh(
            [(start, end - start) for start, end in times],
            (stage - 0.43, 0.86),
            facecolors=colours,
            edgecolor="white",
            linewidth=0.6 if points >= _SMALLEST else 0.0,
        )
        if points < _SMALLEST:
            continue
        for op, (start, end), colour in zip(order, times, colours, strict=True):
            axes.text(
                (start + end) / 2,
                stage,
                op.microbatch,
                ha="center",
                va="center_baseline",
                fontsize=points,
                color=_ink(colour),
            )


def _cell(schedule: Schedule, op: Op) -> str:
    if schedule.num_chunks > 2:
        return f"{op.kind}{op.microbatch}{chr(ord('a') + op.chunk)}"
    return f"{op.kind if op.chunk == 0 else op.kind.lower()}{op.microbatch}"


def _line(name: str, label: int, cells: list[str], cell: int) -> str:
    return f"{name:{label}}  {' '.join(f'{text:{cell}}' for text in cells)}".rstrip()


def _title(schedule: Schedule, time: float) -> str:
    chunks = "" if schedule.num_chunks == 1 else f", {schedule.num_chunks} chunks on a stage"
    bubble = published_bubble(schedule)
    formula = f" = {bubble.formula}" if bubble is not None and bubble.share else ""
    return (
        f"{schedule.name}: {schedule.num_stages} stages, {schedule.num_microbatches} microbatches"
        f"{chunks}; bubble {schedule.bubble_share:.1%}{formula}, step {time:g}"
    )


def _colour(op: Op, num_chunks: int) -> tuple[float, float, float]:
    """The kind's colour, lighter for later chunks."""
    base = matplotlib.colors.to_rgb(_COLOURS[op.kind])
    light = 0.55 * op.chunk / max(1, num_chunks - 1)
    return tuple(value + (1 - value) * light for value in base)


def _ink(colour: tuple[float, float, float]) -> str:
    red, green, blue = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.6 else "#222222"


def _handles(schedule: Schedule) -> list[matplotlib.patches.Patch]:
    handles = [
        matplotlib.patches.Patch(color=_COLOURS[kind], label=words)
        for kind, words in kind_names(schedule).items()
    ]
    handles.append(matplotlib.patches.Patch(color=_WAITS, label="waits"))
    if schedule.num_chunks > 1:
        handles.append(matplotlib.patches.Patch(color="none", label="lighter: later chunk"))
    return handles
