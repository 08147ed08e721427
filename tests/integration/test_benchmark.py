"""llmos-benchmark: what it says of runs, and of one that fails."""

import json

import pytest

from llmos_tf.scripts import benchmark

SMALL = (
    *("--rounds=2", "--steps_in_round=2", "--vocab_size=16", "--hidden_size=16", "--num_heads=2"),
    *("--num_layers=2", "--seq_len=8", "--global_batch=8", "--threads_per_device=1"),
)


def test_runs_take_turns(run_program, tmp_path):
    """Fails if runs have other weights or data, a ratio is not to the first one, or a run that
    fails takes the others along or is not told."""
    path = tmp_path / "out.json"
    runs = ("--run=1", "--run=pipe=2:microbatches=4,schedule=zb-h1", "--run=pipe=4")
    result = run_program(benchmark, *runs, *SMALL, f"--json={path}")
    assert result.status == 1
    one, pipe, failed = json.loads(path.read_text())["rows"]
    # The same weights and batch: float32 in another order.
    assert pipe["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for row in (one, pipe):
        assert row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["tokens_per_second"] == pytest.approx(64 / row["median_seconds"])
        assert len(row["ratios"]) == 2
        assert row["peak_bytes"] > 1e8
    assert one["ratio"] == 1
    assert "cuts a model into 4 parts" in failed["error"]
    assert "| pipe=4 | failed: ValueError: A pipeline of 4 stages" in result.out
