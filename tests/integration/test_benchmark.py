"""llmos-benchmark: what it says of runs, and of one that fails, and that all do the same work."""

import dataclasses
import importlib.util
import json

import pytest

from llmos_tf.scripts import benchmark
from llmos_tf.scripts.peers import kinds

SMALL = (
    *("--rounds=2", "--steps_in_round=2", "--vocab_size=16", "--hidden_size=16", "--num_heads=2"),
    *("--num_layers=2", "--seq_len=8", "--global_batch=8", "--threads_per_device=1"),
)


@pytest.fixture
def without_jax(monkeypatch):
    """As where the package of a run is not installed."""
    absent = dataclasses.replace(kinds.KINDS["jax"], needs="no_such_package")
    monkeypatch.setitem(kinds.KINDS, "jax", absent)


def test_runs_take_turns(run_program, without_jax, tmp_path):
    """Fails if runs have other weights or data, a ratio is not to the first one, or a run that
    fails takes the others along or is not told; or if one that is not installed has no row."""
    path, png = tmp_path / "out.json", tmp_path / "out.png"
    runs = ("--run=1", "--run=pipe=2:microbatches=4,schedule=zb-h1", "--run=pipe=4", "--run=jax")
    result = run_program(benchmark, *runs, *SMALL, f"--json={path}", f"--png={png}")
    assert result.status == 1
    one, pipe, failed, missing = json.loads(path.read_text())["rows"]
    assert missing["missing"] == "no_such_package is not installed: pip install '.[bench]'"
    assert png.read_bytes().startswith(b"\x89PNG")
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


# Those of other frameworks are as many as are installed: CI has TensorFlow only.
PEERS = ["fit:data=2", "keras", "dtensor-data=2", "dtensor-tensor=2"]
MORE = {
    "jax": ["jax-data=2", "jax-tensor=2"],
    "torch": ["torch", "torch-ddp=2", "torch-fsdp=2", "torch-tensor=2", "torch-pipe=2"],
}


@pytest.mark.nightly
def test_all_do_the_same_work(run_program, without_jax, tmp_path):
    """Fails if a peer has another model, batch or optimizer. A first loss without a bias, a mask or
    the tied product, and a later one without weight decay, differ by more. Or if one that is not
    installed counts as a failure."""
    installed = [
        run for name, runs in MORE.items() if importlib.util.find_spec(name) for run in runs
    ]
    runs = [f"--run={run}" for run in ("1", *PEERS, *installed, "jax")]
    path = tmp_path / "out.json"
    small = [flag for flag in SMALL if "rounds" not in flag and "threads" not in flag]
    result = run_program(benchmark, *runs, *small, "--rounds=1", f"--json={path}")
    assert result.status == 0, result.out
    first, *others, last = json.loads(path.read_text())["rows"]
    assert "missing" in last
    for row in others:
        assert row["loss"] == pytest.approx(first["loss"], rel=2e-6), row["run"]
        assert row["later_loss"] == pytest.approx(first["later_loss"], rel=1e-5), row["run"]
    # Training it is: five updates.
    assert first["later_loss"] < 0.99 * first["loss"]
