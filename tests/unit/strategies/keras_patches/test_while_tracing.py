"""What is replaced in Keras while a program is traced."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_strategies import make_model, strategy_of

from llmos_tf.strategies import DataParallelStrategy, ZeroStrategy

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X[:, :2]
TWO = ("CPU:0", "CPU:1")


def fitted(model):
    history = model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    return [*model.get_weights(), *history["loss"], *model.evaluate(X, Y, verbose=0)]


def test_threads_that_fit_at_once():
    """Fails if a thread puts back what another has replaced in Keras, or calls what is meant for
    the other's program. One of them has no strategy."""
    before = keras.layers.Layer.__call__
    names = ("data2", "one", "data2", None)

    def make(name):
        if name is None:
            return make_model()
        with strategy_of(name).scope():
            return make_model()

    alone = [fitted(make(name)) for name in names]
    models = [make(name) for name in names]
    results: list = [None] * len(names)

    def work(i):
        results[i] = fitted(models[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, expected in zip(results, alone, strict=True):
        for one, other in zip(result, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert keras.layers.Layer.__call__ is before


def test_a_tape_outside_of_the_program():
    """Fails if a gradient that is made outside updates other than one device's, or if that of a
    weight that is cut is the gradient of a part."""

    def trained(strategy):
        with strategy.scope():
            model = make_model()
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(X) - Y) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return model.get_weights()

    expected = trained(tf.distribute.get_strategy())
    with pytest.warns(UserWarning, match=r"called outside of strategy[.]run"):
        actual = trained(DataParallelStrategy(TWO))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    with pytest.raises(LookupError, match=r"is cut over the mesh.*make_train_step"):
        trained(ZeroStrategy(stage=3, devices=TWO))


def test_gradients_of_the_whole_variable():
    """Fails if a gradient that no tape has made is refused where the variable is cut, or taken for
    that of a part."""
    strategy = ZeroStrategy(stage=3, devices=TWO)
    with strategy.scope():
        weight = keras.Variable(np.zeros((3, 2)), name="weight")
        optimizer = keras.optimizers.SGD(1.0)

    def step():
        rank = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
        gradient = tf.reshape(tf.range(6.0), (3, 2)) + rank
        optimizer.apply_gradients([(gradient, weight)])

    strategy.run(step)
    np.testing.assert_array_equal(weight.numpy(), -(2 * np.arange(6.0).reshape(3, 2) + 1))


def test_a_stateful_layer_says_what_it_needs():
    """Fails if a state for each row of the batch meets the rows of a replica."""
    with strategy_of("data2").scope():
        model = keras.Sequential(
            [keras.Input((5, 4), batch_size=8), keras.layers.GRU(2, stateful=True)]
        )
        model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"'gru' is stateful.*split into 2 parts"):
        model.fit(X.reshape(16, 1, 4).repeat(5, 1), Y, batch_size=8, verbose=0)


def test_jit_compile_that_is_set_by_hand():
    """Fails if XLA is given the step of all devices, collectives and all."""
    with ZeroStrategy(stage=3, devices=TWO).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.jit_compile = True
    np.testing.assert_allclose(model.predict(X, verbose=0), model(X), atol=1e-6)
