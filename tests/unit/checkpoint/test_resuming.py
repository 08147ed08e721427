"""The newest whole checkpoint: damaged ones are skipped, and named."""

import keras
import numpy as np
import pytest

from llmos_tf.checkpoint import DamagedCheckpointError, restore_latest, save_checkpoint

pytestmark = pytest.mark.fast


def make_model(value=-1.0, units=3):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(units)])
    model.set_weights([np.full(w.shape, value) for w in model.weights])
    return model


@pytest.fixture
def run(tmp_path):
    """A folder with the checkpoints of steps 1, 2 and 3, of weights 1, 2 and 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, make_model(step), step=step, keep=None, extra={"at": step})
    return tmp_path


def flip_last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_one_is_skipped(run):
    """Fails if a run does not continue though an older checkpoint is whole, continues without a
    word, or takes an older one than it has to."""
    model = make_model()
    assert restore_latest(run, model)[:] == (3, {"at": 3}, run / "step-00000003", ())
    (run / "step-00000003" / "state.json").unlink()
    flip_last_bit(run / "step-00000002" / "model.safetensors")
    state = restore_latest(str(run), model)
    assert (state.step, state.extra, state.path.name) == (1, {"at": 1}, "step-00000001")
    np.testing.assert_array_equal(model.get_weights()[0], np.ones([2, 3]))
    assert [path.name for path, _ in state.skipped] == ["step-00000003", "step-00000002"]
    assert "has no state.json" in state.skipped[0].reason
    assert "the bytes of dense/bias have changed" in state.skipped[1].reason


def test_none_is_whole(run):
    """Fails if a model is left with the values of a damaged checkpoint, or one is not named."""
    for step in (1, 2, 3):
        flip_last_bit(run / f"step-0000000{step}" / "model.safetensors")
    model = make_model()
    with pytest.raises(DamagedCheckpointError, match=r"is whole\. step-00000003: .*step-00000001"):
        restore_latest(run, model)
    np.testing.assert_array_equal(model.get_weights()[0], np.full([2, 3], -1.0))
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        restore_latest(run / "none", model)


def test_another_model_is_an_error(run):
    """Fails if a run of another model falls back from checkpoint to checkpoint, and says that all
    are damaged."""
    with pytest.raises(ValueError, match=r"step-00000003 is of another model") as caught:
        restore_latest(run, make_model(units=4))
    assert not isinstance(caught.value, DamagedCheckpointError)
