"""Errors: one paragraph that names the difference, and a model that is what it was."""

import contextlib
import json
import os
import shutil

import keras
import numpy as np
import pytest

from llmos_tf import Mesh
from llmos_tf.checkpoint import (
    DamagedCheckpointError,
    load_config,
    restore_checkpoint,
    save_checkpoint,
)
from llmos_tf.checkpoint.manifest import checksum
from llmos_tf.config import GPTConfig
from llmos_tf.models import GPT, Llama, LlamaConfig
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

GPT_CONFIG = GPTConfig(vocab_size=9, max_positions=4, hidden_size=8, num_heads=2, num_layers=1)
LLAMA_CONFIG = LlamaConfig(
    vocab_size=9, max_positions=4, hidden_size=8, num_heads=2, num_layers=1, feed_forward_size=8
)


def make_gpt(**changes):
    return GPT(GPTConfig.from_dict(GPT_CONFIG.to_dict() | changes))


def make_mlp(units=3, layers=1, optimizer="adam", dtype="float32", name=None):
    model = keras.Sequential([keras.Input([2])])
    for _ in range(layers):
        model.add(keras.layers.Dense(units, dtype=dtype, name=name))
    if optimizer is not None:
        model.compile(optimizer, "mse")
    return model


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of `make_mlp()` after a step."""
    model = make_mlp()
    model.fit(np.ones([1, 2]), np.ones([1, 3]), verbose=0)
    return save_checkpoint(tmp_path / "run", model, step=1)


def refusal(path, model, error=ValueError, **options):
    """The message with which a checkpoint is refused; the model stays what it was."""
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(error) as caught:
        restore_checkpoint(path, model, **options)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    message = str(caught.value)
    assert "\n" not in message
    return message


MODELS = {
    "field": (
        make_gpt,
        lambda: make_gpt(hidden_size=16, dropout=0.5),
        "hidden_size is 8 in the checkpoint and 16 in this model; dropout is 0.0 in the checkpoint "
        "and 0.5 in this model. Make the model with the checkpoint's configuration, "
        "llmos_tf.checkpoint.load_config('",
    ),
    "architecture": (
        make_gpt,
        lambda: Llama(LLAMA_CONFIG),
        "its architecture is gpt, and that of this model llama. Make",
    ),
    "keras model": (
        make_gpt,
        make_mlp,
        "its architecture is gpt, and that of this model without configuration. Make",
    ),
    "of a keras model": (
        make_mlp,
        make_gpt,
        "its architecture is without configuration, and that of this model gpt. Take a checkpoint",
    ),
    "missing variables": (
        make_mlp,
        lambda: make_mlp(units=2, layers=3),
        "it lacks the model's dense_1/kernel, dense_1/bias, dense_2/kernel and 1 more. Make",
    ),
    "other names": (
        make_mlp,
        lambda: make_mlp(name="head"),
        "it lacks the model's head/kernel, head/bias; it holds dense/kernel, dense/bias, which the "
        "model lacks. Make",
    ),
    "shape": (
        make_mlp,
        lambda: make_mlp(units=4),
        "dense/kernel has the shape (2, 3) in the checkpoint and (2, 4) in this model. Make",
    ),
    "dtype": (
        make_mlp,
        lambda: make_mlp(dtype="float16"),
        "dense/kernel is float32 in the checkpoint and float16 in this model. Make",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_another_model_is_refused(tmp_path, case):
    """Fails if weights of another model are taken, or if the message does not say what differs."""
    make_saved, make_other, expected = MODELS[case]
    path = save_checkpoint(tmp_path, make_saved(), step=1)
    message = refusal(path, make_other(), weights_only=True)
    assert message.startswith(f"The checkpoint {path} is of another model: {expected}")


OPTIMIZERS = {
    "class": ("sgd", "the optimizer is Adam in the checkpoint and SGD here"),
    "none": (None, "the optimizer is Adam in the checkpoint and None here"),
    "loss scale": (
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
        "the optimizer is Adam in the checkpoint and LossScaleOptimizer(Adam) here",
    ),
    "option": (
        lambda: keras.optimizers.Adam(amsgrad=True),
        "it lacks the optimizer's 00006/dense/kernel/velocity_hat, 00007/dense/bias/velocity_hat",
    ),
    "schedule": (
        lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9)),
        "it lacks the optimizer's 00001/dense/kernel/momentum",
    ),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_another_optimizer_is_refused(saved, case):
    """Fails if state goes to a slot of another kind, or if weights are assigned before the
    optimizer is checked."""
    optimizer, expected = OPTIMIZERS[case]
    model = make_mlp(optimizer=optimizer() if callable(optimizer) else optimizer)
    message = refusal(saved, model)
    assert message.startswith(f"The checkpoint {saved} does not fit the model's optimizer: ")
    assert expected in message
    assert "weights_only=True" in message


def test_a_checkpoint_without_an_optimizer(tmp_path):
    """Fails if training goes on with an empty optimizer without a word."""
    path = save_checkpoint(tmp_path, make_mlp(optimizer=None), step=1)
    assert not (path / "optimizer.safetensors").exists()
    assert "optimizer is None in the checkpoint and Adam here" in refusal(path, make_mlp())
    assert restore_checkpoint(path, make_mlp(optimizer=None)).step == 1


def test_a_mesh_stays_what_it_was(tmp_path):
    """Fails if the check compares parts instead of full shapes, or assigns some of them."""
    path = save_checkpoint(tmp_path, make_gpt(), step=1)
    with MeshStrategy(Mesh(data=2, tensor=2)).scope():
        model = make_gpt(vocab_size=10)
        assert "vocab_size is 9 in the checkpoint and 10 in this model" in refusal(path, model)
        fitting = make_gpt()
        restore_checkpoint(path, fitting)


def edit_state(path, **changes):
    """Changes fields, or removes those that are Ellipsis, and corrects the checksum."""
    file = path / "state.json"
    content = json.loads(file.read_text()) | changes
    has_checksum = content.pop("sha256", ...) is not ...
    content = {key: value for key, value in content.items() if value is not ...}
    signed = {"sha256": checksum(content)} if has_checksum else {}
    file.write_text(json.dumps(content | signed))


DAMAGES = {
    "model": (
        lambda path: (path / "model.safetensors").write_bytes(b"x" * 100),
        "model.safetensors is not what the checkpoint's state.json says",
    ),
    "no model": (lambda path: (path / "model.safetensors").unlink(), "it is missing"),
    "optimizer": (
        lambda path: shutil.copy(path / "model.safetensors", path / "optimizer.safetensors"),
        "optimizer.safetensors is not what the checkpoint's state.json says",
    ),
    "no state": (lambda path: (path / "state.json").unlink(), "has no state.json. Give the path"),
    "no JSON": (lambda path: (path / "state.json").write_text('{"st'), "is not JSON"),
    "no text": (lambda path: (path / "state.json").write_bytes(b"\xff\xfe"), "is not JSON"),
    "a list": (lambda path: (path / "state.json").write_text("[]"), "does not say format"),
    "another format": (lambda path: edit_state(path, format="x"), "does not say format"),
    "newer": (lambda path: edit_state(path, format_version=3), "format_version=3; this version"),
    "a FIFO": (
        lambda path: ((path / "state.json").unlink(), os.mkfifo(path / "state.json")),
        "state.json must be a regular file. Received: a FIFO.",
    ),
    "a FIFO of weights": (
        lambda path: ((path / "model.safetensors").unlink(), os.mkfifo(path / "model.safetensors")),
        "model.safetensors must be a regular file. Received: a FIFO.",
    ),
    "nested": (lambda path: (path / "state.json").write_text("[" * 200_000), "is not JSON"),
    "digits": (lambda path: (path / "state.json").write_text("1" * 5000), "is not JSON"),
    "no checksum": (lambda path: edit_state(path, sha256=...), "does not match its checksum"),
    "an unknown field": (lambda path: edit_state(path, other=1), "unknown fields ['other']"),
    "wrong field": (lambda path: edit_state(path, model_variables=[{}]), "missing or wrong"),
    "wrong extra": (lambda path: edit_state(path, extra=None), "missing or wrong"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused(saved, case):
    """Fails if half of a checkpoint reaches a model, or the user gets a traceback of a reader."""
    damage, expected = DAMAGES[case]
    damage(saved)
    assert expected in refusal(saved, make_mlp())


def as_version_1(path):
    """Makes a checkpoint one of the first version, which had no checksum."""
    edit_state(path, format_version=1, sha256=...)


def test_every_change_of_the_state_is_seen(saved):
    """Fails if a flipped bit restores another step, position or name; a checksum of the bytes
    alone would refuse a file that was only formatted anew."""
    file, model = saved / "state.json", make_mlp()
    good, content = restore_checkpoint(saved, model), file.read_bytes()
    for place in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        with contextlib.suppress(DamagedCheckpointError):
            assert restore_checkpoint(saved, model) == good
    file.write_text(json.dumps(json.loads(content), sort_keys=True))
    assert restore_checkpoint(saved, model) == good


def test_checkpoints_of_the_first_version(saved):
    """Fails if a checkpoint that was written before there was a checksum cannot be read, or its
    damage is an error of another class."""
    model = make_mlp()
    good = restore_checkpoint(saved, model)
    as_version_1(saved)
    assert restore_checkpoint(saved, model) == good
    records = json.loads((saved / "state.json").read_text())["model_variables"]
    for changes in (
        {"step": -1},
        {"step": True},
        {"step": 1e999},
        {"config": 3},
        {"optimizer": [1]},
        {"model_variables": records * 2},
        *({"model_variables": [records[0] | {"shape": shape}]} for shape in (3, [-1], [1.5], "12")),
        *({"model_variables": [records[0] | {"crc32": crc}]} for crc in (1e999, "1", None)),
        {"model_variables": [records[0] | {"dtype": "float31"}]},
    ):
        original = (saved / "state.json").read_text()
        edit_state(saved, sha256=..., **changes)
        with pytest.raises(
            DamagedCheckpointError, match=r"state\.json: a field is missing or wrong"
        ):
            restore_checkpoint(saved, model)
        (saved / "state.json").write_text(original)


def test_what_is_no_checkpoint(saved, tmp_path):
    """Fails if the message for a wrong path does not say which one would do."""
    (tmp_path / "file").write_text("x")
    model = make_mlp()
    missing = refusal(tmp_path / "none", model, FileNotFoundError)
    assert missing == f"There is no checkpoint '{tmp_path / 'none'}': the path does not exist."
    assert "is not a checkpoint: it has no state.json" in refusal(tmp_path / "file", model)
    assert f"the latest is {saved}." in refusal(saved.parent, model)
    with pytest.raises(ValueError, match="has no weights yet"):
        restore_checkpoint(saved, keras.Sequential([keras.layers.Dense(1)]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"step": -1}, "`step` is an integer of at least 0. Received: -1"),
        ({"step": 1.0}, "`step` is an integer of at least 0. Received: 1.0"),
        ({"step": True}, "`step` is an integer"),
        ({"keep": 0}, "`keep` is an integer of at least 1. Received: 0"),
        ({"extra": [1]}, r"`extra` is a dictionary. Received: \[1\]"),
        ({"extra": {"a": np.ones(2)}}, "`extra` holds what JSON can"),
        ({"model": keras.Sequential([keras.layers.Dense(1)])}, "has no weights yet"),
    ],
)
def test_a_save_that_cannot_be_leaves_nothing(tmp_path, options, expected):
    """Fails if an argument is found wrong after something was written."""
    options = {"model": make_mlp(), "step": 1, **options}
    with pytest.raises(ValueError, match=expected):
        save_checkpoint(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_a_file(tmp_path):
    """Fails if the message does not name the file that is in the way."""
    (tmp_path / "run").write_text("x")
    with pytest.raises(ValueError, match=r"Received: the file '.*run'"):
        save_checkpoint(tmp_path / "run", make_mlp(), step=1)


def test_the_configuration_comes_back(tmp_path):
    """Fails if a script cannot make the model from the checkpoint, or if a checkpoint that was
    written before a field existed no longer fits a model with that field's default."""
    path = save_checkpoint(tmp_path, make_gpt(), step=1)
    assert load_config(path) == GPT_CONFIG
    config = {k: v for k, v in GPT_CONFIG.to_dict().items() if k != "layer_norm_epsilon"}
    edit_state(path, config=config)
    restore_checkpoint(path, GPT(load_config(path)))
    edit_state(path, config=GPT_CONFIG.to_dict() | {"hidden_size": 2**20})
    # Found before a model of that size is built.
    with pytest.raises(DamagedCheckpointError, match="of 4,398,138,785,824 parameters, and the"):
        load_config(path)
    edit_state(path, config=GPT_CONFIG.to_dict() | {"num_heads": 0})
    with pytest.raises(
        ValueError, match=r"state\.json is not one of llmos_tf\.models: `num_heads`"
    ):
        load_config(path)
    edit_state(path, config=None)
    with pytest.raises(ValueError, match="holds no configuration"):
        load_config(path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        load_config(tmp_path / "none")
