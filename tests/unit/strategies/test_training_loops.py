"""`fit` and loops of a user's own have the weights of one device, and trace one program."""

import contextlib
import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import in_turn, usual
from small_strategies import MESHES, MESHES_OF_4, make_model, strategy_of

from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.engine.engine import MAX_EAGER_FUNCTIONS
from llmos_tf.training import make_train_step

pytestmark = pytest.mark.graph_optimizer

X = np.random.default_rng(0).normal(size=(22, 4))
Y = np.random.default_rng(1).normal(size=(22, 2))
# float64: sums in another order differ by 1e-16, which Adam's root of tiny moments magnifies.
TOLERANCE = 1e-10


def on(strategy):
    with strategy.scope():
        return make_model()


def fit(model, rows=16, **options):
    """Trains for two epochs; returns the weights."""
    options = {"epochs": 2, "shuffle": False, "verbose": 0, "batch_size": 8} | options
    model.fit(X[:rows], Y[:rows], **options)
    return model.get_weights()


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("mesh", "rows"),
    usual(
        [("data2", 16), ("data2", 22), ("tensor2", 22), ("fsdp2-tensor2", 22)],
        ("data2", 22),
        ("fsdp2-tensor2", 22),
    ),
)
def test_fit_traces_one_program(float64, mesh, rows):
    """Catches a program that is traced once a device, once a step, or again for the last batch.

    Keras gives the batches of 16 rows a static length, and those of 22 rows, of which the last has
    6, an unknown one; so in either case one program does for all of them. Evaluation is another.
    """
    model = make_model()
    expected = [fit(model, rows), fit(model, rows)]
    axes, options = (MESHES | MESHES_OF_4)[mesh]
    strategy = MeshStrategy(axes, **options)
    model = on(strategy)
    for weights in expected:
        assert_close(fit(model, rows), weights)
        assert strategy.num_traces == 1
    for _ in range(2):
        model.evaluate(X[:rows], Y[:rows], batch_size=8, verbose=0)
        assert strategy.num_traces == 2


def test_steps_in_a_python_loop_trace_once():
    """Catches a function that is traced at each eager call, or kept for ever when it is new."""
    strategy = MeshStrategy(Mesh(data=2))
    with strategy.scope():
        variable = tf.Variable(0.0, aggregation=tf.VariableAggregation.SUM)

    def step(x):
        variable.assign_add(x)

    for i in range(5):
        strategy.run(step, (tf.constant(float(i)),))
    assert float(variable.numpy()) == 20
    assert strategy.num_traces == 1

    class Owner:
        pass

    owner = Owner()
    reference = weakref.ref(owner)
    strategy.run(lambda owner=owner: None)
    del owner
    for _ in range(MAX_EAGER_FUNCTIONS):
        strategy.run(lambda: None)
        # In use all the time, so it stays.
        strategy.run(step, (tf.constant(1.0),))
    gc.collect()
    assert reference() is None
    assert strategy.num_traces == 2 + MAX_EAGER_FUNCTIONS


def test_strategies_of_different_sizes_train_in_turn(float64):
    """Catches groups of two strategies that TensorFlow takes for one (DESIGN: fact 9)."""
    model = make_model()
    expected = [fit(model), fit(model)]
    models = [on(strategy_of(mesh)) for mesh in ("data2", "data4", "tensor2")]
    for weights in expected:
        for model in models:
            assert_close(fit(model), weights)


def custom_loop(strategy, run_loop):
    """The loop of TensorFlow's own tutorials; returns the weights and the sum of the losses."""
    with strategy.scope():
        model = make_model()
        optimizer = keras.optimizers.Adam(0.01)
        loss_object = keras.losses.MeanSquaredError(reduction="none")

    def train_step(x, y):
        with tf.GradientTape() as tape:
            per_example = loss_object(y, model(x, training=True))
            loss = tf.nn.compute_average_loss(per_example, global_batch_size=8)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def distributed_train_step(x, y):
        losses = strategy.run(train_step, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    # 8, 8 and 6 rows.
    dataset = strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    )
    total = run_loop(dataset, distributed_train_step)
    return model.get_weights(), float(total)


def eager_loop(dataset, step):
    return sum(step(x, y) for x, y in dataset)


def graph_loop(dataset, step):
    @tf.function
    def epoch():
        total = tf.constant(0.0, tf.float64)
        for x, y in dataset:
            total += step(x, y)
        return total

    return epoch()


@pytest.mark.parametrize(
    ("mesh", "loop"), in_turn(["data2", "fsdp2-tensor2"], [eager_loop, graph_loop], 2)
)
def test_a_custom_training_loop(float64, mesh, loop):
    """Catches a loop of the tutorials that has other weights or losses than one device."""
    expected, expected_loss = custom_loop(tf.distribute.get_strategy(), eager_loop)
    weights, loss = custom_loop(strategy_of(mesh), loop)
    assert_close(weights, expected)
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)


@pytest.mark.parametrize("mesh", ["data2", "tensor2"])
def test_a_batch_of_no_rows(float64, mesh):
    """Catches an empty batch that stops a mesh, moves weights otherwise than one device does, or
    sets what a layer keeps up to zero."""

    def train(strategy):
        with strategy.scope():
            model = make_model()
        step = make_train_step(model, model.optimizer, "mse")
        logs = [model.train_on_batch(X[:n], Y[:n]) for n in (8, 0)]
        logs += [model.test_on_batch(X[:0], Y[:0]), float(step(X[:0], Y[:0]))]
        assert model.predict_on_batch(X[:0]).shape == (0, 2)
        return [*np.hstack(logs), *model.get_weights()]

    assert_close(train(strategy_of(mesh)), train(tf.distribute.get_strategy()))


def test_a_batch_of_no_rows_is_no_statistic(float64):
    """Catches moving averages that are zero, or not a number, after an empty batch."""
    with strategy_of("data2").scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        model.compile("sgd", "mse")
    statistics = model.layers[0].non_trainable_weights
    assert len(statistics) == 2
    for rows in (8, 0):
        before = [v.numpy() for v in statistics]
        model.train_on_batch(X[:rows], X[:rows])
        are_same = [np.array_equal(v.numpy(), b) for v, b in zip(statistics, before, strict=True)]
        assert are_same == [rows == 0] * 2


def test_fit_takes_booleans(float64):
    """Fails if what Keras builds a model on, a mean of the first batch, stops at a mask."""

    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(keras.ops.where(inputs["mask"], inputs["x"], 0.0))

    rng = np.random.default_rng(0)
    x = {"x": rng.normal(size=(7, 3)), "mask": rng.integers(0, 2, (7, 3)) > 0}
    weights = []
    for strategy in (None, strategy_of("data2")):
        keras.utils.set_random_seed(0)
        with strategy.scope() if strategy is not None else contextlib.nullcontext():
            model = Masked()
            model.compile("sgd", "mse")
        model.fit(x, x["x"][:, :2], batch_size=4, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("mesh", usual(["data4", "fsdp2-tensor2"], "data4"))
def test_fit_takes_distributed_datasets(float64, mesh):
    """Catches a distributed dataset that fit splits again, or whose replicas' batches it mixes.

    A function's dataset gives each replica a batch, so here the replicas' batches of 8/n rows make
    those of 8 rows. The last ones leave some replicas without.
    """
    expected = fit(make_model(), rows=22)
    strategy = strategy_of(mesh)
    rows = tf.data.Dataset.from_tensor_slices((X, Y))
    for dataset in (
        strategy.experimental_distribute_dataset(rows.batch(8)),
        strategy.distribute_datasets_from_function(
            lambda context: rows.batch(context.get_per_replica_batch_size(8))
        ),
    ):
        model = on(strategy)
        model.fit(dataset, epochs=2, verbose=0)
        assert_close(model.get_weights(), expected)
