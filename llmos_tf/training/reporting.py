"""What a run shows and leaves: progress bar, metrics.jsonl, TensorBoard scalars, curves.png."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.figure
import tensorflow as tf
import tqdm

_SCALARS = ("loss", "learning_rate", "tokens_per_second", "mfu")


class RunReport:
    """Reports a training run, step by step.

    Args:
        workdir: where files go; made if missing.
        first_step: the step this run begins with; later lines of an older run that was cut off
            are dropped.
        total_steps: where the run will end.
        tokens_per_step: over all devices.
        flops_per_token: of the model, forward and backward.
        peak_flops: of all devices, FLOP/s.

    Example:
        >>> with RunReport(workdir, 0, 900, 2048, 5e6, 1e11) as report:
        ...     report.step(1, loss=5.5, learning_rate=1e-3)
        ...     report.show_bar(1)
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        total_steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float,
    ):
        self._path = workdir / "metrics.jsonl"
        workdir.mkdir(parents=True, exist_ok=True)
        self._keep_steps_before(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._writer = tf.summary.create_file_writer(str(workdir / "tensorboard"))
        self._total_steps = total_steps
        self._bar: tqdm.tqdm | None = None
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._last = time.perf_counter()
        self._is_first = True

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        self._writer.close()

    def step(self, step: int, loss: float, learning_rate: float, **scalars: float) -> None:
        """Reports one step, just ended.

        Args:
            step: its number, from 1.
            loss: in nats a token.
            learning_rate: with which it updated.
            **scalars: what else is to be kept of it, by name.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = self._tokens_per_step / seconds
        row = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * self._flops_per_token / self._peak_flops,
            **scalars,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        with self._writer.as_default(step):
            for name in (*_SCALARS, *scalars):
                if not (self._is_first and name in ("tokens_per_second", "mfu")):
                    write_scalar(name, row[name], step)
        if self._bar is not None:
            shown = {"loss": f"{loss:.3f}", "tok/s": f"{rate:,.0f}", "MFU": f"{row['mfu']:.1%}"}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(1)
        self._is_first = False

    def show_bar(self, step: int) -> None:
        """Shows a progress bar from now on, whose estimate of the time left begins here.

        Called after the first step, which traces and takes as long as hundreds of others.

        Args:
            step: the number of steps done.
        """
        self._bar = tqdm.tqdm(
            total=self._total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            # The mean of all steps: checkpoints are part of the time left.
            smoothing=0,
            mininterval=bar_interval(),
        )

    def pause(self) -> None:
        """Leaves the time until the next step out of its rate, after a checkpoint, say."""
        self._last = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one.

        Args:
            text: the line.
        """
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def _keep_steps_before(self, first_step: int) -> None:
        if not self._path.exists():
            return
        rows = [row for row in read_metrics(self._path) if row["step"] <= first_step]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def bar_interval() -> float:
    """Returns the seconds between two drawings of a progress bar: fewer where it fills a log."""
    return 0.2 if sys.stderr.isatty() else 15.0


def write_scalar(tag: str, value: float, step: int) -> None:
    """Writes a TensorBoard scalar to the default writer.

    `tf.summary.scalar` would need the tensorboard package, which only a reader needs.

    Args:
        tag: name of the curve.
        value: of the scalar.
        step: on the horizontal axis.
    """
    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"), data_class=1
    )
    tf.summary.write(tag, tf.constant(value, tf.float32), step=step, metadata=metadata)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads metrics.jsonl; a last line that was cut off is left out.

    Args:
        path: the file.

    Returns:
        One dict a step.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_curves(
    rows: list[dict[str, Any]],
    path: Path,
    title: str,
    baseline: float | None = None,
    heldout: float | None = None,
) -> None:
    """Draws loss and tokens/s over steps as a PNG.

    Args:
        rows: as `read_metrics` returns them.
        path: of the picture.
        title: above it.
        baseline: loss of a bigram model on the held-out text, nats per token; None to leave it out.
        heldout: loss of the model on the held-out text after the last step, nats per token; None
            while there is none.
    """
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    steps = [row["step"] for row in rows]
    left, right = figure.subplots(1, 2)
    losses = [row["loss"] for row in rows]
    left.plot(steps, losses, color="tab:blue", linewidth=1, label="training")
    if baseline is not None:
        label = f"bigram model, held-out text: {baseline:.3f}"
        left.axhline(baseline, color="tab:gray", linestyle="--", linewidth=1, label=label)
    if heldout is not None:
        label = f"held-out text: {heldout:.3f}"
        left.plot(steps[-1:], [heldout], "o", color="tab:orange", label=label)
    left.legend()
    left.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    # Without the first step of a run, which traces.
    fast = [row for row in rows if row["seconds"] < 5 * _median(row["seconds"] for row in rows)]
    right.plot(
        [row["step"] for row in fast],
        [row["tokens_per_second"] for row in fast],
        color="tab:green",
        linewidth=1,
    )
    right.set(xlabel="step", ylabel="tokens per second", title="Speed", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _median(values) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
