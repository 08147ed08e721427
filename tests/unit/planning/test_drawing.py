"""Pictures of schedules: every op is in them, and they fit a screen."""

import re

import matplotlib.image
import pytest

from llmos_tf.planning import draw_png, draw_text, text_legend
from llmos_tf.planning.schedules import make_schedule

pytestmark = pytest.mark.fast

PICTURE = """\
tick     0  1  2  3  4  5  6  7  8  9
stage 0  F0 F1 F2 F3 ·  ·  B0 B1 B2 B3
stage 1  ·  F0 F1 F2 F3 B0 B1 B2 B3 ·"""


def test_a_row_is_a_stage_and_a_column_a_tick():
    """Fails if an op is drawn in another place than it has."""
    assert draw_text(make_schedule("gpipe", 2, 4)) == PICTURE


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("1f1b", 4, 12), r"[FB]\d+"),
        (("zb-h1", 12, 24), r"[FBW]\d+"),
        (("zb-v", 4, 16), r"[FBWfbw]\d+"),
        (("interleaved", 4, 8, 3), r"[FB]\d+[abc]"),
    ],
)
def test_every_op_is_drawn_once(arguments, pattern):
    """Fails if ops are lost where lines go on below, two chunks look the same, or a line is longer
    than asked for."""
    schedule = make_schedule(*arguments)
    text = draw_text(schedule, width=100)
    found = re.findall(rf"(?<=[ ]){pattern}\b", text)
    ops = [op for stage in range(schedule.num_stages) for op in schedule.order(stage)]
    assert len(found) == len(ops)
    # Each once on each stage.
    assert len(set(found)) == len(set(ops))
    assert max(map(len, text.splitlines())) <= 100
    assert schedule.num_chunks == 1 or "chunk" in text_legend(schedule)


def test_a_long_schedule_is_shortened():
    """Fails if hundreds of lines are printed, or what is left out is not said."""
    lines = draw_text(make_schedule("1f1b", 4, 500)).splitlines()
    assert len(lines) < 40
    assert lines[-4].endswith("B499")
    (left_out,) = (line for line in lines if line.startswith("..."))
    first, last = map(int, re.findall(r"\d+", left_out))
    shown = [int(t) for line in lines if line.startswith("tick") for t in line.split()[1:]]
    assert shown == [*range(first), *range(last + 1, 2 * 503)]


@pytest.mark.parametrize("arguments", [("1f1b", 2, 2), ("zb-v", 4, 8), ("gpipe", 8, 256)])
def test_a_png_is_drawn(arguments, tmp_path):
    """Fails if a small or a very long schedule cannot be drawn, or nothing of a kind is in it."""
    schedule = make_schedule(*arguments)
    draw_png(schedule, tmp_path / "it.png")
    pixels = matplotlib.image.imread(tmp_path / "it.png")[..., :3]
    assert 900 < pixels.shape[1] <= 6000
    # Without the legend, which has all colours.
    pixels = pixels[: pixels.shape[0] // 2]
    for colour in ("1f5fa8", "1b8a5a", "d9822b"):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        is_there = bool((abs(pixels - rgb) < 0.01).all(axis=-1).any())
        assert is_there == (colour != "d9822b" or schedule.splits_backward)
