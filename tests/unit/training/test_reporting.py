"""What a run leaves: metrics.jsonl, TensorBoard scalars, curves.png."""

import struct
import time

import matplotlib.image
import pytest
import tensorflow as tf

from llmos_tf.training.reporting import RunReport, draw_curves, read_metrics

pytestmark = pytest.mark.fast


def report_steps(workdir, first_step, numbers):
    with RunReport(
        workdir,
        first_step,
        total_steps=9,
        tokens_per_step=100,
        flops_per_token=50.0,
        peak_flops=1e6,
    ) as report:
        for step in numbers:
            report.step(step, loss=10.0 - step, learning_rate=0.1 * step, load=0.5)
            if step == numbers[0]:
                report.say("the first step")
                report.show_bar(step)


def scalars(workdir):
    """Tag and step to value, of all event files."""
    found = {}
    for path in sorted((workdir / "tensorboard").glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    return found


def test_a_line_for_each_step(tmp_path, capsys):
    """Fails if a field is missing or mixed up with another, or the rate is not that of the time."""
    report_steps(tmp_path, 0, [1, 2])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert [row["loss"] for row in rows] == [9.0, 8.0]
    assert [row["learning_rate"] for row in rows] == [0.1, 0.2]
    assert [row["load"] for row in rows] == [0.5, 0.5]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(100 / row["seconds"])
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 50.0 / 1e6)
    out, err = capsys.readouterr()
    assert "loss=8.000" in err
    assert out == "the first step\n"


def test_the_time_left_is_that_of_steps_that_do_not_trace(tmp_path, capsys):
    """Fails if the first step, which traces for minutes, counts in the estimate of the time left,
    also of a resumed run."""
    for first in (1, 500):
        with RunReport(tmp_path, first - 1, 1000, 100, 50.0, 1e6) as report:
            time.sleep(0.5)
            report.step(first, loss=1.0, learning_rate=0.1)
            report.show_bar(first)
            for step in range(first + 1, first + 4):
                time.sleep(0.01)
                report.step(step, loss=1.0, learning_rate=0.1)
            report._bar.refresh()
            *_, last = capsys.readouterr().err.replace("\r", "\n").splitlines()
        assert f"{first + 3}/1000" in last
        minutes, seconds = last.partition("<")[2].partition(",")[0].split(":")
        # With the first step it would be minutes.
        assert 60 * int(minutes) + int(seconds) < 60


def test_scalars_for_tensorboard(tmp_path):
    """Fails if a curve is missing, lies at another step, or shows the rate of the step that
    traces."""
    report_steps(tmp_path, 0, [1, 2])
    found = scalars(tmp_path)
    assert {tag for tag, step in found if step == 1} == {"loss", "learning_rate", "load"}
    assert {tag for tag, step in found if step == 2} == {
        "loss",
        "learning_rate",
        "tokens_per_second",
        "mfu",
        "load",
    }
    assert found["loss", 2] == 8.0


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    """Fails if steps after the checkpoint are there twice, or those before it are lost, also where
    the older run was killed in the middle of a line."""
    report_steps(tmp_path, 0, [1, 2, 3, 4])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    report_steps(tmp_path, 2, [3])
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_picture_of_the_curves(tmp_path):
    """Fails if the file is no picture, or a single step or a slow one cannot be drawn."""
    report_steps(tmp_path, 0, [1, 2, 3])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    rows[0]["seconds"] = 1e3
    for name, drawn in [("curves.png", rows), ("one.png", rows[:1])]:
        draw_curves(drawn, tmp_path / name, "a title")
        data = (tmp_path / name).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert (width, height) == (1200, 480)


def test_the_picture_shows_what_the_training_came_to(tmp_path):
    """Fails if the held-out result or the baseline is not drawn: both colours have to be there."""
    report_steps(tmp_path, 0, [1, 2, 3])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    draw_curves(rows, tmp_path / "curves.png", "a title", baseline=9.5, heldout=8.5)
    pixels = matplotlib.image.imread(tmp_path / "curves.png")[..., :3].reshape(-1, 3)
    for color in ((0xFF, 0x7F, 0x0E), (0x7F, 0x7F, 0x7F)):
        assert (abs(pixels * 255 - color) < 1).all(axis=1).sum() > 40
