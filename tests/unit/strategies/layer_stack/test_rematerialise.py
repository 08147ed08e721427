"""`rematerialise` of a strategy: one device's weights, with less kept for the backward pass."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from lanes import usual

from llmos_tf import Mesh, devices, memory
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.layer_stack import rematerialise
from llmos_tf.strategies.layer_stack.rematerialise import Recomputation
from llmos_tf.testing import max_difference, train
from llmos_tf.training import make_train_step

TOLERANCE = 1e-9
TOKENS = np.random.default_rng(0).integers(0, 24, (8, 17))
BATCHES = [(TOKENS[i : i + 4, :-1], TOKENS[i : i + 4, 1:]) for i in (0, 4)]
SPEC = tf.TensorSpec([4, 16], tf.int64)


def on(rematerialise=None, options=None, **axes):
    count = Mesh(**axes).size
    mesh = Mesh(**axes, devices=devices.visible_devices()[:count])
    return MeshStrategy(mesh, rematerialise=rematerialise, **(options or {}))


def gpt(dropout=0.0):
    sizes = {"vocab_size": 24, "max_positions": 16, "hidden_size": 8, "num_heads": 4}
    model = GPT(GPTConfig(**sizes, num_layers=2, dropout=dropout))
    model.compile("adamw", TokenCrossEntropy())
    return model


@pytest.fixture(scope="module")
def one_device():
    """The result without a mesh, in float64, as the tests compute that take it."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    result = train(gpt, BATCHES)
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
    return result


CASES = {
    "selective-data2": ("selective", {"data": 2}, {}),
    "full-data2": ("full", {"data": 2}, {}),
    "bytes-fsdp2": (20_000, {"fsdp": 2}, {"zero_stage": 3}),
    "selective-fsdp2": ("selective", {"fsdp": 2}, {"zero_stage": 3}),
    "selective-tensor2": ("selective", {"tensor": 2}, {}),
    "selective-sequence2": ("selective", {"tensor": 2}, {"sequence_parallel": True}),
    "block-sequence2": ("block", {"tensor": 2}, {"sequence_parallel": True}),
    "selective-context2": ("selective", {"context": 2}, {}),
}


@pytest.mark.parametrize(
    "name",
    usual(
        CASES,
        "full-data2",
        "bytes-fsdp2",
        "selective-sequence2",
        "block-sequence2",
        "selective-context2",
    ),
)
def test_weights_are_those_of_one_device(float64, one_device, name):
    """Fails if what is kept is not what the gradient needs, or if collectives of the second run
    meet those of the first."""
    option, axes, options = CASES[name]
    actual = train(gpt, BATCHES, on(option, options, **axes))
    assert max_difference(one_device, actual) <= TOLERANCE


@pytest.mark.parametrize("axes", usual([{"data": 2}, {"pipe": 2}], {"pipe": 2}), ids=str)
def test_the_second_run_draws_the_masks_of_the_first(float64, axes):
    """Fails if dropout draws another mask the second time, or if the stages of a pipeline advance
    a stream of random numbers that is used in a block."""
    kept = train(lambda: gpt(dropout=0.3), BATCHES, on(**axes))
    again = train(lambda: gpt(dropout=0.3), BATCHES, on("selective", **axes))
    assert max_difference(kept, again) <= 1e-13


class Encoder(layers.Layer):
    """A block of Keras's own layers."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(4, 2, dropout=0.1)
        self.norm = layers.LayerNormalization()
        self.up, self.down = layers.Dense(32, activation="gelu"), layers.Dense(8)

    def build(self, shape):
        self.attention.build(shape, shape)
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 32))

    def call(self, x, training=None):
        y = self.norm(x)
        x = x + self.attention(y, y, training=training)
        return x + self.down(self.up(x))


def encoder(jit_compile=False, num_blocks=4):
    inputs = keras.Input([16], dtype="int32")
    x = layers.Embedding(24, 8)(inputs)
    for _ in range(num_blocks):
        x = Encoder()(x)
    model = keras.Model(inputs, layers.Dense(24)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=jit_compile)
    return model


def activations(option, build=encoder):
    with on(option, data=2).scope():
        model = build()
    return memory.report(model, batch=(SPEC, SPEC))[0]["activations"]


def test_less_is_kept_of_a_keras_model_in_this_order():
    """Fails if an option has no effect on a model of Keras's layers, or if "selective" keeps
    attention scores, or nothing."""
    none, selective, block = map(activations, ("none", "selective", "block"))
    # Of a block 4 heads' scores and 8 tensors of its hidden layer are 3/4 of what there is.
    assert selective < 0.6 * none
    assert block < selective


def test_a_budget_is_kept_to(monkeypatch):
    """Fails if blocks keep more than the budget, or if it does not choose by what they keep."""
    chosen = []
    find = rematerialise.cheapest_within

    def noting(blocks, budget):
        places = find(blocks, budget)
        chosen.append([way[i] for way, i in zip(blocks, places, strict=True)])
        return places

    monkeypatch.setattr(rematerialise, "cheapest_within", noting)
    all_kept = activations(10**9)
    kept = sum(way.bytes for way in chosen[0])
    assert all(way.cost == 0 for way in chosen[0])
    half = activations(kept // 2)
    assert 0.4 * kept < sum(way.bytes for way in chosen[1]) <= kept // 2
    # What is saved is what was counted, but for a block that is computed again.
    assert 0.35 * kept < all_kept - half


def test_a_budget_that_cannot_be_met_says_the_least():
    """Fails if too small a budget is taken in silence, or no number is named that would do."""
    with pytest.raises(ValueError, match=r"rematerialise=10 is .* 4 blocks .* keep (\d+) bytes"):
        activations(10)


def test_fit_on_arrays_with_a_budget():
    """Fails if the rows of a batch of `fit`, which its step does not know, are not found."""
    with on(2_000, data=2).scope():
        model = encoder(num_blocks=2)
    with pytest.raises(ValueError, match="keep 2048 bytes on a device at least"):
        model.fit(TOKENS[:, :-1], TOKENS[:, 1:], batch_size=4, verbose=0)


def test_rows_that_nobody_knows_are_asked_for():
    """Fails if what is kept is counted for one row, and a budget is overrun."""
    strategy = on(10**6, data=2)
    with strategy.scope():
        model = encoder(num_blocks=2)
        optimizer = keras.optimizers.SGD()
    step = make_train_step(model, optimizer, "mse")
    rows = tf.TensorSpec([None, 16], tf.int32)
    with pytest.raises(ValueError, match=r"has to be known. Received: shape .*drop_remainder=True"):
        step.get_concrete_function(rows, tf.TensorSpec([None, 16, 24]))


@pytest.mark.parametrize("option", usual(["block", "selective"], "selective"))
def test_compiled_blocks(option):
    """Fails if XLA compiles the whole model, of which nothing could be computed again then."""
    kept = activations(None, lambda: encoder(jit_compile=True))
    assert activations(option, lambda: encoder(jit_compile=True)) < 0.8 * kept


def test_which_layers_are_blocks():
    """Fails if the blocks of a model in a model are not found, if a model without any has nothing
    to be computed again, or if "full" takes a stack for one layer."""
    inner = encoder(num_blocks=2)
    outer = keras.Sequential([inner, layers.Dense(4)])
    outer.build([None, 16])
    plain = keras.Sequential([layers.Dense(4), layers.LayerNormalization()])
    plain.build([None, 4])

    def taken(model, option):
        found = Recomputation.of_model(model, option)
        x = tf.ones([1, 4])
        called = (y for y in model._flatten_layers() if not isinstance(y, layers.InputLayer))
        return {layer for layer in called if found.takes(layer, (x,), {})}

    blocks = {layer for layer in inner.layers if isinstance(layer, Encoder)}
    assert taken(outer, "block") == taken(outer, "selective") == blocks
    assert taken(plain, "block") == taken(plain, "full") == set(plain.layers)
    assert taken(outer, "full") > {*blocks, outer.layers[-1]}
    assert not taken(outer, "none")


@pytest.mark.parametrize("option", ["some", 0, -5, True, 1.5])
def test_options_that_mean_nothing(option):
    """Fails if a wrong name trains without a word and saves nothing."""
    with pytest.raises(ValueError, match=r"none, full, block, selective, or the bytes .* Received"):
        on(option, data=2)


def test_a_budget_is_not_for_a_pipeline():
    """Fails if a budget is taken where it is not kept to."""
    with pytest.raises(ValueError, match="without a pipe axis"):
        on(1000, pipe=2)
