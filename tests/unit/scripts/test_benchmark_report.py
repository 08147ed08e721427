"""What llmos-benchmark says of times that are known."""

from types import SimpleNamespace

import matplotlib.image
import pytest

from llmos_tf.config import GPTConfig
from llmos_tf.scripts import benchmark_report as report

pytestmark = pytest.mark.fast

OPTIONS = SimpleNamespace(
    global_batch=2,
    seq_len=10,
    workload=SimpleNamespace(
        config=GPTConfig(vocab_size=8, max_positions=10, hidden_size=4, num_heads=2, num_layers=1)
    ),
)


def finished(name, rounds, loss=4.0, later_loss=3.0, **changed):
    values = {
        "name": name,
        "devices": 2,
        "is_ours": True,
        "missing": None,
        "error": None,
        "rounds": rounds,
        "round_medians": [sorted(times)[1] for times in rounds],
        "first": {"first_step": 9.0, "loss": loss, "later_loss": later_loss},
        "peak_bytes": 2**21,
    }
    return SimpleNamespace(**values | changed)


RUNS = [
    finished("1", [[1.0, 4.0, 4.0], [1.0, 2.0, 2.0], [1.0, 3.0, 3.0]]),
    finished("keras", [[1.0, 1.0, 9.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], is_ours=False),
    finished("torch", [], missing="torch is not installed: do", is_ours=False),
    finished("data=2", [], error="ValueError: first | line\nsecond line"),
]


@pytest.fixture
def rows():
    return report.make_rows(RUNS, OPTIONS, None)


def test_figures_of_a_run(rows):
    """Fails if a median is that of medians, a ratio that of medians over all rounds, or a run
    without times has figures."""
    one, keras, torch, data = rows
    # Of the nine times 1 1 1 2 2 3 3 4 4, and of rounds whose medians are 4, 2 and 3.
    assert (one["median_seconds"], one["min_seconds"], one["max_seconds"]) == (2.0, 1.0, 4.0)
    assert one["round_spread"] == (4 - 2) / 3
    assert one["tokens_per_second"] == 10.0
    assert keras["ratios"] == [1 / 4, 1 / 2, 2 / 3]
    assert keras["ratio"] == 1 / 2
    assert "mfu" not in one
    assert torch == {"run": "torch", "is_ours": False, "missing": "torch is not installed: do"}
    assert set(data) == {"run", "is_ours", "error"}


def test_ratios_of_pairs(rows):
    """Fails if a ratio is upside down, or one of a run without times ends the report."""
    pairs = report.pair_rows(rows, [("1", "keras"), ("torch", "1")])
    assert pairs[0] == {"run": "1", "to": "keras", "ratio": 2.0, "ratios": [4.0, 2.0, 1.5]}
    assert pairs[1] == {"run": "torch", "to": "1"}
    everything = report.all_ratios(rows)
    assert everything["keras"] == {"1": 0.5, "keras": 1.0}
    assert "| 1 / keras | 2.000 | 1.50 to 4.00 |" in report.pair_table(pairs)


def test_the_table(rows):
    """Fails if a row has another number of cells than the head, which a message with a bar or a
    line end in it would do."""
    lines = report.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 1 | 2.000 | 1.000 | 4.000 | ±33.3% | 1.000 | 1.00 to 1.00 | 10 |")
    assert lines[4].startswith("| torch | torch is not installed: do |")
    assert lines[5].startswith("| data=2 | failed: ValueError: first / line second line |")
    assert "MFU" not in lines[0]


def test_utilisation_where_a_gpu_is():
    """Fails if utilisation is that of one device where there are two, or of another rate."""
    (row,) = report.make_rows(RUNS[:1], OPTIONS, 1e4)
    flops = OPTIONS.workload.config.flops_per_token(10)
    assert row["mfu"] == pytest.approx(10.0 * flops / 2e4)
    assert f"| {row['mfu']:.1%} |" in report.table([row])


def test_runs_that_did_other_work():
    """Fails if a run with another model or optimizer is compared without a word, also where its
    loss is no number."""
    times = [[1.0, 1.0, 1.0]]
    runs = [
        finished("1", times),
        finished("same", times, loss=4.0003, later_loss=3.002),
        finished("model", times, loss=4.001),
        finished("optimizer", times, later_loss=3.01),
        finished("broken", times, later_loss=float("nan")),
    ]
    lines = report.disagreements(report.make_rows(runs, OPTIONS, None))
    assert [line.split()[0] for line in lines] == ["model", "optimizer", "broken"]
    assert "its loss is 4.00100 and not 4.00000 at first" in lines[0]


def test_the_picture(rows, tmp_path):
    """Fails if runs without times cannot be drawn, or nothing is: both colours have to be there."""
    path = tmp_path / "out.png"
    report.draw(rows, path, "title")
    pixels = matplotlib.image.imread(path)[..., :3].reshape(-1, 3)
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        assert (abs(pixels * 255 - color) < 1).all(axis=1).sum() > 1000
