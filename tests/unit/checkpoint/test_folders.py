"""Folders: a checkpoint is there completely or not at all, and the right ones go."""

import os
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

from llmos_tf.checkpoint import folders, latest_checkpoint, restore_checkpoint, save_checkpoint

pytestmark = pytest.mark.fast


def make_model(value=0.0):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.set_weights([np.full(w.shape, value) for w in model.weights])
    return model


def restored(path):
    """The one value that all weights of a checkpoint have."""
    model = make_model(-1.0)
    restore_checkpoint(path, model)
    (value,) = {float(v) for w in model.get_weights() for v in w.flat}
    return value


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_a_checkpoint_consists_of(tmp_path):
    """Fails if a file is missing, lies elsewhere, or others of the group cannot read the folder."""
    path = save_checkpoint(tmp_path / "new" / "run", make_model(), step=120)
    assert path == tmp_path / "new" / "run" / "step-00000120"
    assert listing(path.parent) == ["step-00000120"]
    assert listing(path) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    (tmp_path / "ordinary").mkdir()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_an_error_in_the_middle_leaves_the_older_one(tmp_path, monkeypatch, error, step):
    """Fails if a save that stops at its third variable leaves a file, or harms the older one."""
    save_checkpoint(tmp_path, make_model(1.0), step=1)
    model = make_model(2.0)

    def fail():
        raise error

    monkeypatch.setattr(model.weights[2], "numpy", fail)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, model, step=step)
    assert listing(tmp_path) == ["step-00000001"]
    assert restored(latest_checkpoint(tmp_path)) == 1.0


@pytest.mark.parametrize("point", range(4))
def test_a_crash_leaves_the_older_one(tmp_path, monkeypatch, point):
    """Fails if a machine that stops while model, optimizer, state or folder go to disk (nothing
    is cleaned up then) has put anything under a checkpoint's name, or leaves rubbish for ever."""
    save_checkpoint(tmp_path, make_model(1.0), step=1)
    with monkeypatch.context() as crash:
        crash.setattr(shutil, "rmtree", lambda *_, **__: None)
        calls = iter(range(10))

        def fsync(descriptor):
            if next(calls) == point:
                raise SystemExit

        crash.setattr(os, "fsync", fsync)
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path, make_model(2.0), step=2)
    assert len(listing(tmp_path)) == 2
    assert restored(latest_checkpoint(tmp_path)) == 1.0
    save_checkpoint(tmp_path, make_model(3.0), step=3)
    assert listing(tmp_path) == ["step-00000001", "step-00000003"]


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Fails if a file is renamed into place before it is synced: a power cut would empty it."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save_checkpoint(tmp_path, make_model(), step=1)
    files, writing, name, parent = events[:3], *events[3:]
    assert files == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert writing.startswith(".writing-step-00000001")
    assert (name, parent) == ("rename", tmp_path.name)


def test_a_step_is_replaced(tmp_path, monkeypatch):
    """Fails if a second save of a step is refused, or if, when it cannot get its name, the first
    does not get it back."""
    save_checkpoint(tmp_path, make_model(1.0), step=1)
    save_checkpoint(tmp_path, make_model(2.0), step=1)
    assert listing(tmp_path) == ["step-00000001"]
    assert restored(tmp_path / "step-00000001") == 2.0
    rename = Path.rename

    def fail_to_appear(path, target):
        if path.name.startswith(".writing-"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_to_appear)
    with pytest.raises(OSError, match="no"):
        save_checkpoint(tmp_path, make_model(3.0), step=1)
    assert listing(tmp_path) == ["step-00000001"]
    assert restored(tmp_path / "step-00000001") == 2.0


@pytest.mark.parametrize(
    ("keep", "steps", "expected"),
    [
        (1, [1, 2, 3], [3]),
        (2, [9, 10, 100], [10, 100]),
        (None, [1, 2, 3], [1, 2, 3]),
        # Started again from an older step: the one just written stays.
        (2, [300, 600, 100], [100, 600]),
        (1, [300, 100], [100]),
    ],
)
def test_the_oldest_go(tmp_path, keep, steps, expected):
    """Fails if steps are ordered as text, too many go, or the one just written goes."""
    for step in steps:
        save_checkpoint(tmp_path, make_model(), step=step, keep=keep)
    assert listing(tmp_path) == [folders.step_name(step) for step in expected]


def test_the_latest_is_a_checkpoint(tmp_path):
    """Fails if a temporary, foreign or incomplete folder, or a file, is taken for a checkpoint."""
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, make_model(), step=99_999_999)
    save_checkpoint(tmp_path, make_model(), step=5)
    others = ("step-900000000", ".writing-step-900000000-0", "step-0900000000", "step-x", "best")
    for name in others:
        (tmp_path / name).mkdir()
        if name != "step-900000000":
            shutil.copy(path / "state.json", tmp_path / name)
    (tmp_path / "step-900000001").write_text("a file")
    assert latest_checkpoint(str(tmp_path)) == path
    longer = save_checkpoint(tmp_path, make_model(), step=100_000_000, keep=None)
    assert latest_checkpoint(tmp_path) == longer
    # What --checkpoint takes: a checkpoint, and the folder of a run.
    assert latest_checkpoint(path) == path
    of_run = tmp_path / "run" / "checkpoints" / path.name
    of_run.parent.mkdir(parents=True)
    path.rename(of_run)
    assert latest_checkpoint(tmp_path / "run") == of_run
    # Foreign folders are left alone.
    assert {"best", "step-x", "step-900000000"} <= set(listing(tmp_path))
