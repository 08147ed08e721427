"""What llmos-benchmark makes of the times: rows, ratios, a table and a picture."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from llmos_tf.files.pictures import write_png
from llmos_tf.scripts.benchmark_options import BenchmarkOptions
from llmos_tf.scripts.benchmark_process import RunProcesses

_CELL_WIDTH = 160


def make_rows(
    runs: list[RunProcesses], options: BenchmarkOptions, peak_flops: float | None
) -> list[dict[str, Any]]:
    """Returns what is known of each run.

    Args:
        runs: those of the benchmark; the first one is what the others are compared with.
        options: of the benchmark.
        peak_flops: of one GPU, FLOP/s, or None without any.

    Returns:
        A dictionary a run, as JSON takes it: `error` or `missing`, or figures.
    """
    return [_row(run, runs[0], options, peak_flops) for run in runs]


def ratio(one: list[float], other: list[float]) -> dict[str, Any]:
    """Returns the ratio of two runs.

    Args:
        one: median step time of each round.
        other: the same of the other run.

    Returns:
        `ratios` of each round, and their median, `ratio`.
    """
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return {"ratio": statistics.median(ratios), "ratios": ratios}


def all_ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the ratio of every run to every other one.

    Args:
        rows: by `make_rows`.

    Returns:
        Name of a run to name of another to median of the ratios of rounds.
    """
    good = {row["run"]: row["round_medians"] for row in rows if "round_medians" in row}
    return {
        one: {other: ratio(mine, its)["ratio"] for other, its in good.items()}
        for one, mine in good.items()
    }


def pair_rows(rows: list[dict[str, Any]], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Returns the ratios that were asked for.

    Args:
        rows: by `make_rows`.
        pairs: names of two runs each.

    Returns:
        A dictionary a pair; without a ratio where one of the runs has no times.
    """
    good = {row["run"]: row["round_medians"] for row in rows if "round_medians" in row}
    return [
        {"run": one, "to": other}
        | (ratio(good[one], good[other]) if one in good and other in good else {})
        for one, other in pairs
    ]


def disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the runs that have not trained as the first one that has times.

    Args:
        rows: by `make_rows`.

    Returns:
        A line for each whose first loss differs by more than 1e-4 of it, or the one after the
        updates by more than 1e-3.
    """
    good = [row for row in rows if "median_seconds" in row]
    return [
        f"{row['run']} has not trained as {good[0]['run']}: its loss is {row[name]:.5f} and not "
        f"{good[0][name]:.5f} {when}. Know the reason before their times are compared."
        for row in good
        for name, limit, when in (("loss", 1e-4, "at first"), ("later_loss", 1e-3, "after 5 steps"))
        if not abs(row[name] / good[0][name] - 1) <= limit
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of runs.

    Args:
        rows: by `make_rows`.

    Returns:
        Markdown.
    """
    titles = ["run", "step, median s", "min", "max", "between rounds", "ratio", "its rounds"]
    titles += ["tokens/s", "first step, s", "peak MB", "first loss", "after 5 steps"]
    has_mfu = any("mfu" in row for row in rows)
    titles += ["MFU"] * has_mfu
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows:
        if "median_seconds" not in row:
            words = row.get("missing") or f"failed: {row['error']}"
            cells = [row["run"], _cell(words)] + [""] * (len(titles) - 2)
        else:
            cells = [
                row["run"],
                f"{row['median_seconds']:.3f}",
                f"{row['min_seconds']:.3f}",
                f"{row['max_seconds']:.3f}",
                f"±{row['round_spread'] / 2:.1%}",
                *_ratio_cells(row),
                f"{row['tokens_per_second']:,.0f}",
                f"{row['first_step_seconds']:.1f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['loss']:.4f}",
                f"{row['later_loss']:.4f}",
            ]
            if has_mfu:
                cells.append(f"{row['mfu']:.1%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pair_table(pairs: list[dict[str, Any]]) -> str:
    """Returns the table of the ratios that were asked for.

    Args:
        pairs: by `pair_rows`.

    Returns:
        Markdown.
    """
    lines = ["| ratio of step times | median | its rounds |", "|---|---|---|"]
    for pair in pairs:
        lines.append(f"| {pair['run']} / {pair['to']} | {' | '.join(_ratio_cells(pair))} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws a bar a run, as long as its median step, with a whisker from its min to its max.

    Args:
        rows: by `make_rows`; those without times have their name and no bar.
        path: of the PNG.
        title: above it.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 1.2 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    medians, mins, maxes = (
        [row.get(f"{name}_seconds", 0.0) for row in rows] for name in ("median", "min", "max")
    )
    whiskers = (np.subtract(medians, mins), np.subtract(maxes, medians))
    # Ours in one colour and the peers in another.
    colors = ["tab:blue" if row["is_ours"] else "tab:orange" for row in rows]
    places = range(len(rows))
    axes.barh(places, medians, xerr=whiskers, color=colors, ecolor="0.3", capsize=3)
    longest = max(maxes) or 1.0
    for place, row in enumerate(rows):
        end = row.get("max_seconds", 0.0)
        words = f"{row['median_seconds']:.3f}" if end else "not installed"
        if "error" in row:
            words = "failed"
        axes.text(end + 0.01 * longest, place, words, va="center", fontsize=8)
    axes.set_yticks(places, [row["run"] for row in rows])
    axes.invert_yaxis()
    axes.set(
        xlabel="seconds a step: median, with min and max (blue: ours)", xlim=(0, 1.1 * longest)
    )
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    write_png(path, figure, dpi=120)


def _row(
    run: RunProcesses, base: RunProcesses, options: BenchmarkOptions, peak_flops: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.name, "is_ours": run.is_ours}
    if run.missing:
        return row | {"missing": run.missing}
    if run.error is not None:
        return row | {"error": run.error}
    times = [time for times in run.rounds for time in times]
    medians = run.round_medians
    median = statistics.median(times)
    tokens_per_second = options.global_batch * options.seq_len / median
    row |= {
        "median_seconds": median,
        "min_seconds": min(times),
        "max_seconds": max(times),
        "round_medians": medians,
        "round_spread": (max(medians) - min(medians)) / statistics.median(medians),
        "tokens_per_second": tokens_per_second,
        "first_step_seconds": run.first["first_step"],
        "peak_bytes": run.peak_bytes,
        "loss": run.first["loss"],
        "later_loss": run.first["later_loss"],
    }
    if base.round_medians and base.error is None:
        row |= ratio(medians, base.round_medians)
    if peak_flops:
        flops = options.workload.config.flops_per_token(options.seq_len)
        row["mfu"] = tokens_per_second * flops / (peak_flops * run.devices)
    return row


def _ratio_cells(row: dict[str, Any]) -> list[str]:
    if "ratio" not in row:
        return ["", ""]
    return [f"{row['ratio']:.3f}", f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"]


def _cell(words: str) -> str:
    """One line, without what would end a cell of a table."""
    words = " ".join(words.split()).replace("|", "/")
    return words if len(words) <= _CELL_WIDTH else f"{words[: _CELL_WIDTH - 1]}…"
