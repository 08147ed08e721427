"""Checkpoints: what one mesh wrote goes on in another, exactly."""

import contextlib

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from llmos_tf import Mesh
from llmos_tf.checkpoint import restore_checkpoint, save_checkpoint
from llmos_tf.checkpoint.contents import training_contents
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy, ZeroStrategy
from llmos_tf.training import make_train_step

ROWS, LENGTH, VOCABULARY = 4, 8, 30
TWO = ("CPU:0", "CPU:1")


def make_gpt(strategy=None, dropout=0.0, seed=0):
    """A compiled GPT whose values depend on the seed, made after others in the same process."""
    keras.utils.set_random_seed(seed)
    config = GPTConfig(
        vocab_size=VOCABULARY,
        max_positions=LENGTH,
        hidden_size=16,
        num_heads=4,
        num_layers=2,
        dropout=dropout,
    )
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = GPT(config)
        model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), TokenCrossEntropy())
    return model


def make_mlp(strategy=None, optimizer=lambda: keras.optimizers.AdamW(0.01), seed=0):
    """A Sequential with moving averages and sizes that two devices do not divide."""
    keras.utils.set_random_seed(seed)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = keras.Sequential(
            [
                keras.Input([3]),
                keras.layers.Dense(5, activation="tanh"),
                keras.layers.BatchNormalization(synchronized=True),
                keras.layers.Dense(1),
            ]
        )
        model.compile(optimizer(), keras.losses.MeanSquaredError())
    return model


def batches(model, begin, end):
    """Steps `begin` to `end` of the same stream of batches."""
    for step in range(begin, end):
        rng = np.random.default_rng(step)
        if isinstance(model, GPT):
            tokens = rng.integers(0, VOCABULARY, [ROWS, LENGTH + 1]).astype("int32")
            yield tokens[:, :-1], tokens[:, 1:]
        else:
            yield rng.normal(size=[ROWS, 3]), rng.normal(size=[ROWS, 1])


def advance(model, begin, end):
    step = make_train_step(model, model.optimizer, model.loss)
    for batch in batches(model, begin, end):
        step(*batch)


def values(model):
    """All full tensors of model and optimizer."""
    contents = training_contents(model)
    variables = contents.model_variables | contents.optimizer_variables
    return {name: variable.numpy() for name, variable in variables.items()}


def assert_equal(actual, expected, tolerance=0.0):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance, err_msg=name)


def test_a_gpt_moves_from_mesh_to_one_device_to_another_mesh(float64, tmp_path):
    """Fails if a rank's part is stored for the whole, a slot is lost or belongs to another weight,
    the iterations begin anew, or names depend on how many models the process has made."""
    first = make_gpt(MeshStrategy(Mesh(data=2, tensor=2)))
    advance(first, 0, 2)
    saved = values(first)
    path = save_checkpoint(tmp_path / "a", first, step=2, extra={"position": 8})

    single = make_gpt(seed=1)
    assert restore_checkpoint(path, single) == (2, {"position": 8})
    assert_equal(values(single), saved)
    path = save_checkpoint(tmp_path / "b", single, step=2)

    sharded = make_gpt(MeshStrategy(Mesh(fsdp=2)), seed=2)
    assert restore_checkpoint(path, sharded) == (2, {})
    assert_equal(values(sharded), saved)

    for model in (first, single, sharded):
        advance(model, 2, 4)
    uninterrupted = values(first)
    assert not np.array_equal(
        uninterrupted["token_embedding/table"], saved["token_embedding/table"]
    )
    for model in (single, sharded):
        assert_equal(values(model), uninterrupted, tolerance=1e-12)


@pytest.mark.parametrize("strategy", [DataParallelStrategy, ZeroStrategy], ids=["stage0", "stage1"])
def test_cut_optimizer_state_is_stored_whole(float64, tmp_path, strategy):
    """Fails if padding of cut slots is stored, or slots come back on the wrong rank."""
    strategies = {
        DataParallelStrategy: lambda: DataParallelStrategy(TWO),
        ZeroStrategy: lambda: ZeroStrategy(1, TWO),
    }
    first = make_mlp(ZeroStrategy(1, TWO))
    advance(first, 0, 2)
    saved = values(first)
    path = save_checkpoint(tmp_path, first, step=2)
    stored = load_file(path / "optimizer.safetensors")
    assert stored["00003/dense/kernel/velocity"].shape == (3, 5)

    second = make_mlp(strategies[strategy](), seed=1)
    restore_checkpoint(path, second)
    assert_equal(values(second), saved)
    for model in (first, second):
        advance(model, 2, 4)
    assert_equal(values(second), values(first), tolerance=1e-12)


def test_dropout_goes_on_with_the_masks_it_would_have_drawn(float64, tmp_path):
    """Fails if the states of seed generators are not stored, or ranks get one mask for all."""
    first = make_gpt(MeshStrategy(Mesh(data=2)), dropout=0.3)
    advance(first, 0, 1)
    path = save_checkpoint(tmp_path, first, step=1)
    second = make_gpt(MeshStrategy(Mesh(data=2)), dropout=0.3, seed=1)
    restore_checkpoint(path, second)
    for model in (first, second):
        advance(model, 1, 3)
    assert_equal(values(second), values(first))


OPTIMIZERS = {
    "loss-scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9), initial_scale=64.0, dynamic_growth_steps=2
    ),
    "accumulation-and-average": lambda: keras.optimizers.Adam(
        0.01, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=3
    ),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 4)),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_kind_of_optimizer_state_comes_back(tmp_path, optimizer):
    """Fails if loss scale, growth counter, accumulated gradients, averages, learning rate or the
    product of Nadam's momenta is not stored: three steps leave each of them in mid-course."""
    first = make_mlp(optimizer=OPTIMIZERS[optimizer])
    advance(first, 0, 3)
    if optimizer == "nadam":
        first.optimizer.learning_rate = 0.005
    path = save_checkpoint(tmp_path, first, step=3)
    second = make_mlp(optimizer=OPTIMIZERS[optimizer], seed=1)
    restore_checkpoint(path, second)
    assert_equal(values(second), values(first))
    for model in (first, second):
        advance(model, 3, 6)
    assert_equal(values(second), values(first))


def test_weights_only_leaves_the_optimizer_alone(tmp_path):
    """Fails if evaluation needs an optimizer, or touches the one that is there."""
    first = make_mlp()
    advance(first, 0, 2)
    path = save_checkpoint(tmp_path, first, step=2)
    second = make_mlp(seed=1)
    bare = keras.models.clone_model(second)
    for model in (second, bare):
        restore_checkpoint(path, model, weights_only=True)
        for weight, expected in zip(model.get_weights(), first.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, expected)
    assert not second.optimizer.built


def test_a_custom_loop_has_an_optimizer_of_its_own(tmp_path):
    """Fails if the optimizer of a model that is not compiled is not stored or not restored."""
    states = []
    for seed in (0, 1):
        model = keras.models.clone_model(make_mlp(seed=seed))
        optimizer = keras.optimizers.AdamW(0.01)
        if seed == 0:
            step = make_train_step(model, optimizer, "mse")
            step(*next(batches(model, 0, 1)))
            path = save_checkpoint(tmp_path, model, step=1, optimizer=optimizer)
        else:
            restore_checkpoint(path, model, optimizer=optimizer)
        states.append([variable.numpy() for variable in [*model.variables, *optimizer.variables]])
    for first, second in zip(*states, strict=True):
        np.testing.assert_array_equal(first, second)
