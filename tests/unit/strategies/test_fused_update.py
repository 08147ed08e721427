"""Updates in few ops: what is traced, and groups. All optimizers' numbers: `tests/equivalence`."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import devices
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy, fused_update


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


@pytest.mark.parametrize(
    ("optimizer", "kernel"),
    [
        (keras.optimizers.SGD, "ResourceApplyGradientDescent"),
        (lambda: keras.optimizers.SGD(momentum=0.9), "ResourceApplyKerasMomentum"),
    ],
)
def test_a_kernel_for_each_variable(optimizer, kernel):
    """Fails if a variable is updated by Keras's small ops again."""
    ops = _ops_of_update(optimizer)
    assert ops.count(kernel) == 8
    assert not {"Sqrt", "RealDiv", "AssignAddVariableOp"} & set(ops[:-4])


def test_one_group_for_all_small_variables():
    """Fails if an optimizer without a kernel is traced variable by variable."""
    assert _ops_of_update(keras.optimizers.Adamax).count("Maximum") == 1


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


def test_adam_is_keras_adam_in_float32():
    """Fails if 1 - β2 is taken of a β2 in float32, as TensorFlow's kernel does: 5e-5 off."""

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
    """Fails if a kernel is taken for an optimizer that only inherits from one that has it."""

    class Normalized(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            norm = tf.norm(gradient)
            super().update_step(gradient / norm, variable, learning_rate)

    scope = MeshStrategy(Mesh(devices=devices.visible_devices()[:1])).scope()
    mine = _trained(lambda: Normalized(0.1), scope)
    theirs = _trained(lambda: Normalized(0.1), contextlib.nullcontext())
    _assert_same(mine, theirs)
