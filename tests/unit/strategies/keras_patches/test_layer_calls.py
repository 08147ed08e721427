"""`jit_compile=True`: the largest parts of a model that do not communicate are compiled."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from llmos_tf import Mesh, devices
from llmos_tf.config import GPTConfig
from llmos_tf.graph import outlined_function
from llmos_tf.models import GPT
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy, ZeroStrategy
from llmos_tf.testing import max_difference, train

pytestmark = pytest.mark.graph_optimizer

TOLERANCE = 1e-9
_rng = np.random.default_rng(0)
FEATURES = _rng.normal(size=(9, 6))
LABELS = _rng.integers(0, 3, 9)
# The last batch has one row: fewer than devices, and another length to compile for.
BATCHES = [(FEATURES[i : i + 4], LABELS[i : i + 4]) for i in (0, 4, 8)]
TOKENS = _rng.integers(0, 24, (8, 9))
TOKEN_BATCHES = [(TOKENS[i : i + 4, :-1], TOKENS[i : i + 4, 1:]) for i in (0, 4)]

STRATEGIES = {
    "one": lambda: DataParallelStrategy(devices.visible_devices()[:1]),
    "data2": lambda: DataParallelStrategy(devices.visible_devices()[:2]),
    "zero3-2": lambda: ZeroStrategy(stage=3, devices=devices.visible_devices()[:2]),
    "tensor2": lambda: MeshStrategy(Mesh(tensor=2, devices=devices.visible_devices()[:2])),
}


@pytest.fixture
def compiled(monkeypatch):
    """Names of the layers that were compiled, for each call in a program."""
    names = []
    call = outlined_function.Block.call

    def noted(block, *args, **kwargs):
        if block.compiled:
            names.append(block._owner.name)
            assert block._concrete.function_def.attr["_XlaMustCompile"].b
        return call(block, *args, **kwargs)

    monkeypatch.setattr(outlined_function.Block, "call", noted)
    return names


def classifier(jit=False, scope=None):
    """The loss looks behind the last activation."""
    with keras.RematScope(scope):
        model = keras.Sequential(
            [layers.Dense(8, activation="gelu"), layers.Dense(3, activation="softmax")],
            name="classifier",
        )
    model.compile("adamw", "sparse_categorical_crossentropy", jit_compile=jit)
    return model


@pytest.mark.parametrize("name", ["data2", "zero3-2"])
def test_whole_model_is_compiled_where_it_does_not_communicate(float64, compiled, name):
    """Fails if `jit_compile` is ignored, if a gather of fsdp keeps a model from being compiled, or
    if a compiled block changes numbers."""
    expected = train(classifier, BATCHES)
    actual = train(lambda: classifier(jit=True), BATCHES, STRATEGIES[name]())
    assert max_difference(expected, actual) <= TOLERANCE
    np.testing.assert_allclose(actual.losses, expected.losses, atol=TOLERANCE)
    assert compiled == ["classifier"]
    actual.model.evaluate(FEATURES, LABELS, verbose=0)
    actual.model.predict(FEATURES, verbose=0)
    assert compiled == ["classifier"] * 3


def gpt(jit=False):
    model = GPT(GPTConfig(vocab_size=24, max_positions=8, hidden_size=8, num_heads=2, num_layers=2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adamw", loss, jit_compile=jit)
    return model


def test_collectives_stay_outside(float64, compiled):
    """Fails if a layer that communicates is compiled, or if none is because one communicates."""
    expected = train(gpt, TOKEN_BATCHES)
    actual = train(lambda: gpt(jit=True), TOKEN_BATCHES, STRATEGIES["tensor2"]())
    assert max_difference(expected, actual) <= TOLERANCE
    assert not {"gpt", "block_0", "attention", "token_embedding"} & set(compiled)
    assert {"up", "down", "query_key_value"} <= set(compiled)


def test_what_is_rematerialised_is_compiled_too(float64, compiled):
    """Fails if `RematScope` undoes `jit_compile`, or the other way round."""
    expected = train(classifier, BATCHES)
    actual = train(lambda: classifier(True, "full"), BATCHES, STRATEGIES["data2"]())
    assert max_difference(expected, actual) <= TOLERANCE
    assert len(compiled) >= 2


class Branch(layers.Layer):
    """Statistics, random numbers and a term of the loss."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = layers.BatchNormalization(), layers.Dropout(0.2)
        self.dense = layers.Dense(6, activity_regularizer="l2")

    def call(self, x, training=None):
        return self.dense(self.dropout(self.norm(x, training=training), training=training))


def test_state_and_losses_of_a_compiled_block(float64, compiled):
    """Fails if statistics, seeds or losses of a block are lost, or stay behind in its graph."""

    def build(jit):
        model = keras.Sequential([Branch(), layers.Dense(3)], name="branches")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, jit_compile=jit)
        return model

    # Without replicas, of which a compiled block would know its own rows only.
    one = STRATEGIES["one"]
    results = [train(lambda jit=jit: build(jit), BATCHES, one()) for jit in (0, 1)]
    assert compiled == ["branches"]
    plain, jit = ({v.path: v.numpy() for v in result.model.variables} for result in results)
    # XLA draws other random numbers from the same seeds, but as many.
    seeds = [path for path in plain if "seed_generator" in path]
    assert seeds
    for path in seeds:
        np.testing.assert_array_equal(plain[path], jit[path])
    # The first layer's statistics are of the rows alone.
    moving = [path for path in plain if "moving" in path]
    assert len(moving) == 2
    for path in moving:
        np.testing.assert_allclose(plain[path], jit[path], atol=1e-12)
    assert len(results[1].model.losses) == 1


def test_layers_around_a_loop_are_compiled(float64, compiled):
    """Fails if a loop, whose intermediate results XLA cannot hand over, is compiled (an error in
    the first step), or if it keeps all other layers from being compiled."""

    def build(jit=False):
        model = keras.Sequential([layers.GRU(4, name="gru"), layers.Dense(3, name="last")])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, jit_compile=jit)
        return model

    rows = [(np.stack([x, x + 1], 1), y) for x, y in BATCHES[:2]]
    expected = train(build, rows)
    actual = train(lambda: build(jit=True), rows, STRATEGIES["data2"]())
    assert max_difference(expected, actual) <= TOLERANCE
    assert "last" in compiled
    assert "gru" not in compiled


class Cumulated(layers.Layer):
    """A loop, and no layer in it."""

    def call(self, x):
        return tf.scan(lambda total, row: total + row, x)


def test_a_model_of_which_nothing_is_compiled_says_so(compiled):
    """Fails if `jit_compile=True` is ignored without a word."""
    with STRATEGIES["data2"]().scope():
        model = keras.Sequential([keras.Input((6,)), Cumulated()])
        model.compile("sgd", "mse", jit_compile=True)
    with pytest.warns(UserWarning, match="jit_compile=True has no effect on the model"):
        model.evaluate(FEATURES[:8], FEATURES[:8], verbose=0)
    assert compiled == []


def test_steps_stay_as_they_are_without_it(compiled):
    """Fails if XLA is used where nobody asked for it."""
    train(classifier, BATCHES[:1], STRATEGIES["data2"]())
    assert compiled == []


def test_run_eagerly_comes_first():
    """Fails if Keras's own rule, that `run_eagerly` excludes XLA, is lost."""
    with STRATEGIES["data2"]().scope():
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
        with pytest.warns(UserWarning, match="`run_eagerly` is True"):
            model.compile("sgd", "mse", jit_compile=True, run_eagerly=True)
    model.fit(FEATURES, FEATURES[:, :3], verbose=0)
    assert isinstance(model.weights[0].value, tf.Variable)


@pytest.mark.parametrize("strategy", [None, "data2"])
def test_lookups_are_sparse_where_they_are_rematerialised(float64, strategy):
    """Fails if an adaptive optimizer updates a table by another gradient because of `RematScope`,
    on a mesh or on one device."""

    def build(scope=None):
        with keras.RematScope(scope):
            model = keras.Sequential([layers.Embedding(24, 4), layers.Dense(24)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", loss)
        return model

    expected = train(build, TOKEN_BATCHES)
    # Made in any case: `RematScope` works in graphs from then on.
    mesh = STRATEGIES["data2"]()
    actual = train(lambda: build("full"), TOKEN_BATCHES, mesh if strategy else None)
    assert max_difference(expected, actual) <= TOLERANCE
