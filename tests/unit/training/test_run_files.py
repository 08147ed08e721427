"""What a run shows and leaves, how it stops, and what its speed is measured against."""

import json
import os
import signal

import pytest
import tensorflow as tf

from llmos_tf.training.flops import peak_flops
from llmos_tf.training.interrupt import GracefulStop
from llmos_tf.training.reporting import RunReport, draw_curves, read_metrics


def report(workdir, first_step=0, total=4):
    return RunReport(workdir, first_step, total, 100, 2e3, 1e9)


def test_lines_and_scalars(tmp_path):
    """Fails if a step has no line, a rate is wrong by a factor, or TensorBoard finds no curve."""
    with report(tmp_path) as run:
        for step in (1, 2, 3):
            run.step(step, loss=3.0 / step, learning_rate=0.1)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["loss"] == 3.0 / row["step"]
        assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"])
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 2e3 / 1e9)
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    tags = {}
    for event in tf.compat.v1.train.summary_iterator(str(events)):
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    assert tags["loss"] == [3.0, 1.5, 1.0]
    # The first step traces; its rate would bend the axis.
    assert (len(tags["tokens_per_second"]), len(tags["learning_rate"])) == (2, 3)


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    """Fails if steps stand twice in the file, or half a line makes it unreadable."""
    with report(tmp_path) as run:
        for step in (1, 2, 3):
            run.step(step, loss=1.0, learning_rate=0.1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with report(tmp_path, first_step=2) as run:
        run.step(3, loss=2.0, learning_rate=0.1)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_the_picture(tmp_path):
    """Fails if no PNG is written, or a run of one step cannot be drawn."""
    row = {"step": 1, "loss": 1.0, "seconds": 1.0, "tokens_per_second": 9.0}
    for rows in ([row], [row, {**row, "step": 2}]):
        draw_curves(rows, tmp_path / "curves.png", "title")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(row)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_the_second_acts(number):
    """Fails if the first signal kills, the second is swallowed, or handlers are not put back."""
    before = signal.getsignal(number)
    caught = []
    signal.signal(number, lambda *_: caught.append(number))
    try:
        with GracefulStop() as stop:
            assert stop.requested is None
            os.kill(os.getpid(), number)
            assert (stop.requested, caught) == (number.name, [])
            os.kill(os.getpid(), number)
            assert caught == [number]
        with GracefulStop():
            pass
        os.kill(os.getpid(), number)
        assert caught == [number, number]
    finally:
        signal.signal(number, before)


def test_peak_is_what_this_machine_can_do():
    """Fails if virtual CPU devices, which share one machine, are counted as many machines."""
    one, source = peak_flops(("CPU:0",))
    eight, _ = peak_flops(tuple(f"CPU:{i}" for i in range(8)))
    assert source == "measured float32 matrix product"
    assert one > 1e8
    # Measured twice on a machine that may be busy; eight would be eight times.
    assert eight < 4 * one
