"""Updates in few ops: what is traced, and groups. All optimizers' numbers: `tests/equivalence`."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import devices
from llmos_tf.graph import fusion
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.optimizer import fused_update

pytestmark = pytest.mark.graph_optimizer


def _model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(6, activation="tanh") for _ in range(4)]
    return keras.Sequential([keras.Input((6,)), *layers])


def _trained(optimizer, scope):
    with scope:
        model = _model()
        model.compile(optimizer(), "mse")
    x = np.random.default_rng(0).normal(size=(8, 6))
    model.fit(x, np.tanh(x[:, ::-1]), batch_size=4, epochs=3, shuffle=False, verbose=0)
    return model


def _assert_same(mine, theirs):
    """Compares weights, and the state of the optimizer."""
    states = [[*m.variables, *m.optimizer.variables] for m in (mine, theirs)]
    for one, other in zip(*states, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=1e-12)


def _ops_of_update(optimizer):
    """Types of the ops of a program that applies gradients of ones, but for what only moves."""
    strategy = MeshStrategy(Mesh(devices=devices.visible_devices()[:1]))
    with strategy.scope():
        model = _model()
        optimizer = optimizer()
        optimizer.build(model.trainable_variables)

    def update():
        ones = [tf.ones(variable.shape) for variable in model.trainable_variables]
        optimizer.apply(ones, model.trainable_variables)

    step = tf.function(lambda: strategy.run(update), autograph=False).get_concrete_function()
    functions = step.graph.as_graph_def().library.function
    return [node.op for function in functions for node in function.node_def]


def test_one_group_for_all_small_variables():
    """Fails if small variables are traced one by one."""
    assert _ops_of_update(keras.optimizers.Adamax).count("Maximum") == 1


def test_one_compiled_function_for_each_shape_of_a_large_variable(monkeypatch):
    """Fails if large variables are laid end to end, or each is traced by itself."""
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 36)
    # That of the four kernels, and the group of the four biases.
    assert _ops_of_update(keras.optimizers.Adamax).count("Maximum") == 2


def test_a_compiled_update_is_in_place(monkeypatch):
    """Fails if the update computes new values beside the variable's, as for a group."""
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 36)
    strategy = MeshStrategy(Mesh(devices=devices.visible_devices()[:1]))
    with strategy.scope():
        model = _model()
        optimizer = keras.optimizers.AdamW(0.01)
        optimizer.build(model.trainable_variables)
    kernel = model.layers[0].kernel

    def address():
        value = kernel._value.values[0].read_value()
        return value.numpy().__array_interface__["data"][0]

    @tf.function(autograph=False)
    def step():
        ones = [tf.ones(variable.shape) for variable in model.trainable_variables]
        strategy.run(lambda: optimizer.apply(ones, model.trainable_variables))

    step()
    before, values = address(), kernel.numpy().copy()
    step()
    assert address() == before
    assert not np.array_equal(kernel.numpy(), values)


_OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "amsgrad": lambda: keras.optimizers.Adam(0.01, amsgrad=True, gradient_accumulation_steps=2),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, use_ema=True),
    "adamax": lambda: keras.optimizers.Adamax(0.01, weight_decay=0.1),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.9, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
    "lion": lambda: keras.optimizers.Lion(0.01),
}


@pytest.mark.parametrize(
    ("name", "zero_stage"), [*((name, 1) for name in _OPTIMIZERS), ("adamw", 0), ("sgd", 0)]
)
def test_compiled_updates_train_the_weights_of_one_device(float64, monkeypatch, name, zero_stage):
    """Fails if a compiled update forgets decay, a slot, or what an optimizer has once for all.

    On stage 1 what is updated of a weight is a slice of it, on stage 0 the weight where it lies.
    """
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 6)
    mesh = Mesh(data=2, devices=devices.visible_devices()[:2])
    mine = _trained(_OPTIMIZERS[name], MeshStrategy(mesh, zero_stage=zero_stage).scope())
    theirs = _trained(_OPTIMIZERS[name], contextlib.nullcontext())
    _assert_same(mine, theirs)


@pytest.mark.parametrize("group_bytes", [1, 8 * 6 * 7])
def test_groups_train_the_weights_of_one_device(float64, monkeypatch, group_bytes):
    """Fails if a variable gets another one's part of a group, with a group each or for several."""
    monkeypatch.setattr(fused_update, "GROUP_BYTES", group_bytes)

    def optimizer():
        return keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True, weight_decay=0.1)

    mesh = Mesh(data=2, devices=devices.visible_devices()[:2])
    mine = _trained(optimizer, MeshStrategy(mesh, zero_stage=1).scope())
    theirs = _trained(optimizer, contextlib.nullcontext())
    _assert_same(mine, theirs)


@pytest.mark.parametrize("min_elements", [6, 2**15])
def test_adam_is_keras_adam_in_float32(monkeypatch, min_elements):
    """Fails if 1 - β2 is taken of a β2 in float32, as TensorFlow's kernel does: 5e-5 off."""
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", min_elements)

    def optimizer():
        return keras.optimizers.Adam(0.01)

    mine = _trained(optimizer, MeshStrategy(Mesh(devices=devices.visible_devices()[:1])).scope())
    theirs = _trained(optimizer, contextlib.nullcontext())
    for one, other in zip(mine.optimizer._velocities, theirs.optimizer._velocities, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-5)


@pytest.mark.parametrize("kind", [keras.optimizers.AdamW, keras.optimizers.Lion])
def test_what_is_left_out_of_weight_decay(float64, kind):
    """Fails if `exclude_from_weight_decay` is forgotten by the update in a few ops."""

    def optimizer():
        made = kind(0.01, weight_decay=0.5)
        made.exclude_from_weight_decay(var_names=["bias"])
        return made

    mine = _trained(optimizer, MeshStrategy(Mesh(devices=devices.visible_devices()[:1])).scope())
    theirs = _trained(optimizer, contextlib.nullcontext())
    _assert_same(mine, theirs)


def test_a_subclass_is_updated_by_its_own_rule(float64):
    """Fails if an optimizer that only inherits from one of Keras's is taken for that one."""

    class Normalized(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            norm = tf.norm(gradient)
            super().update_step(gradient / norm, variable, learning_rate)

    scope = MeshStrategy(Mesh(devices=devices.visible_devices()[:1])).scope()
    mine = _trained(lambda: Normalized(0.1), scope)
    theirs = _trained(lambda: Normalized(0.1), contextlib.nullcontext())
    _assert_same(mine, theirs)
