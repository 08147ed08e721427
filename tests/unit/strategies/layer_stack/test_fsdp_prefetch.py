"""Weights of blocks: gathered while the block before computes, let go, gathered again."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from lanes import usual

from llmos_tf import Mesh, collectives, devices, memory
from llmos_tf.collectives.annotations import sending
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig, Llama, LlamaConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.testing import max_difference, train
from llmos_tf.training import make_train_step

pytestmark = pytest.mark.graph_optimizer


def on(reshard=True, options=None, **axes):
    mesh = Mesh(**axes, devices=devices.visible_devices()[: Mesh(**axes).size])
    return MeshStrategy(mesh, reshard_after_forward=reshard, **(options or {}))


def _noted_rank():
    """1 on the rank that notes what it does."""
    return collectives.axis_index("fsdp") * (1 - collectives.axis_index("tensor"))


class Slow(layers.Layer):
    """A block of two kernels; on rank 1 each of its passes takes a while between them.

    On one rank only, as a sleeping op holds one of TensorFlow's threads, of which there may be two.
    """

    def __init__(self, width, events):
        super().__init__()
        self.up, self.down = (layers.Dense(size, use_bias=False) for size in (width, 8))
        self.width = width
        # Keras would keep a copy of a list.
        self.note = events.append

    def build(self, shape):
        self.up.build(shape)
        self.down.build((*shape[:-1], self.width))

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        @tf.custom_gradient
        def slow(x):
            return self.wait(x, "forward"), lambda dy: self.wait(dy, "backward")

        # On one rank of `tensor` nothing is sent.
        return self.down(collectives.reduce_from_axis(slow(self.up(x)), "tensor"))

    def wait(self, x, what):
        def wait(x, rank):
            if rank == 1:
                time.sleep(0.3)
                self.note((what, self.width))
            return x

        rank = _noted_rank()
        y = tf.numpy_function(wait, [x, rank], x.dtype, stateful=False)
        return tf.ensure_shape(y, x.shape)


WIDTHS = (16, 24, 32, 40)


def executed(monkeypatch, reshard, options=None, **axes):
    """The order in which a step's passes through blocks end, and their gathers."""
    events, original = [], tf.raw_ops.CollectiveGatherV2
    elements = {8 * width: width for width in WIDTHS}

    def observed(**arguments):
        y = original(**arguments)
        size = 2 * arguments["input"].shape.num_elements()
        if size not in elements:
            return y

        def note(first, rank):
            if rank == 1:
                events.append(("gather", elements[size]))
            return first

        rank = _noted_rank()
        first = tf.numpy_function(note, [y[0], rank], y.dtype, stateful=False)
        return tf.concat([tf.ensure_shape(first, [])[tf.newaxis], y[1:]], 0)

    monkeypatch.setattr(tf.raw_ops, "CollectiveGatherV2", observed)
    strategy = on(reshard, options, **axes)
    with strategy.scope():
        model = keras.Sequential(
            [layers.Dense(8, name="first"), *(Slow(width, events) for width in WIDTHS)]
        )
        model.build([4, 8])
        step = make_train_step(model, keras.optimizers.SGD(), "mse")
    x = np.ones((4, 8), "float32")
    # As between devices that share no memory.
    with sending(strategy):
        step(x, x)
        events.clear()
        step(x, x)
    return events


def by_passes(events):
    """For each pass through a block, what was gathered since the one before, and the pass."""
    found, gathered = [], []
    for event in events:
        what, width = event
        if what == "gather":
            gathered.append(width)
        else:
            found.append((sorted(gathered), event))
            gathered = []
    return found


@pytest.mark.parametrize("reshard", usual([False, True], True))
def test_the_next_block_is_gathered_while_this_one_computes(monkeypatch, reshard):
    """Fails if all gathers start with the step, if one waits until the block before is through, or
    if the backward pass gathers late: after what is sent of the gradients of the block after."""
    events = executed(monkeypatch, reshard, fsdp=2)
    # What has come by the end of a pass that had not by the end of the one before: the block's own
    # weights and those of the next, then one block's more each time.
    turns = [[16, 16, 24, 24], [32, 32], [40, 40], []]
    expected = [*zip(turns, [("forward", width) for width in WIDTHS], strict=True)]
    turns = [[32, 32, 40, 40], [24, 24], [16, 16], []] if reshard else [[]] * 4
    expected += zip(turns, [("backward", width) for width in WIDTHS[::-1]], strict=True)
    assert by_passes(events) == expected


def test_the_next_block_is_gathered_before_this_one_sends(monkeypatch):
    """Fails if gathers come after what a block sends itself, along another axis than fsdp. Of the
    first two blocks it is not known what they will read."""
    options = {"layout_map": {".*first/kernel": (None, "tensor")}}
    events = executed(monkeypatch, True, options, fsdp=2, tensor=2)
    turns = [[16], [16, 24, 32, 32], [24, 40, 40], []]
    expected = [*zip(turns, [("forward", width) for width in WIDTHS], strict=True)]
    turns = [[32, 32, 40, 40], [24, 24], [16, 16], []]
    expected += zip(turns, [("backward", width) for width in WIDTHS[::-1]], strict=True)
    assert by_passes(events) == expected


TOKENS = np.random.default_rng(0).integers(0, 24, (20, 17))
BATCHES = [(TOKENS[i : i + 4, :-1], TOKENS[i : i + 4, 1:]) for i in range(0, 20, 4)]
SIZES = {"vocab_size": 24, "max_positions": 16, "hidden_size": 8, "num_heads": 4, "num_layers": 3}


def gpt():
    model = GPT(GPTConfig(**SIZES))
    model.compile("adamw", TokenCrossEntropy())
    return model


def llama():
    model = Llama(LlamaConfig(**SIZES, num_kv_heads=2, feed_forward_size=16))
    model.compile("adamw", TokenCrossEntropy())
    return model


class Encoder(layers.Layer):
    """A block of Keras's own layers, which hands masks on."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True
        self.attention = layers.MultiHeadAttention(4, 2)
        self.norm = layers.LayerNormalization()
        self.up, self.down = layers.Dense(32, activation="gelu"), layers.Dense(8)

    def build(self, shape):
        self.attention.build(shape, shape)
        self.norm.build(shape)
        self.up.build(shape)
        self.down.build((*shape[:-1], 32))

    def call(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y)
        return x + self.down(self.up(x))


def encoder(jit_compile=False):
    inputs = keras.Input([16], dtype="int32")
    x = layers.Embedding(24, 8, mask_zero=True)(inputs)
    for _ in range(3):
        x = Encoder()(x)
    model = keras.Model(inputs, layers.Dense(24)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adamw", loss, jit_compile=jit_compile)
    return model


def case(build, changed=None, options=None, nightly=True, **axes):
    changed, options = changed or {}, options or {}
    more = (f"{name}={value}" for name, value in {**changed, **options}.items())
    name = "-".join([build.__name__, str(Mesh(**axes)), *more])
    marks = [pytest.mark.nightly] if nightly else []
    return pytest.param(build, changed, options, axes, id=name, marks=marks)


SP = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("build", "changed", "options", "axes"),
    [
        case(llama, data=2, fsdp=2, nightly=False),
        case(encoder, fsdp=2, nightly=False),
        case(encoder, fsdp=4),
        case(encoder, {"jit_compile": True}, fsdp=2),
        case(gpt, fsdp=2),
        case(gpt, fsdp=2, tensor=2),
        case(llama, None, SP, fsdp=2, tensor=2),
        case(gpt, None, {"rematerialise": "selective"}, fsdp=2),
        case(encoder, None, {"rematerialise": 30_000}, fsdp=2),
    ],
)
def test_weights_are_those_of_one_device(float64, build, changed, options, axes):
    """Fails if the backward pass is given another weight than the forward pass had, or a block's
    masks are lost on the way out of it."""
    strategy = on(True, options, **axes)
    expected = train(build, BATCHES)
    actual = train(lambda: build(**changed), BATCHES, strategy)
    assert max_difference(expected, actual) <= 1e-9
    assert strategy.num_traces == 1


class Penalised(keras.Model):
    """Blocks, one frozen and one called twice, and a gradient of a gradient in the loss."""

    def __init__(self):
        super().__init__()
        self.blocks = [Encoder() for _ in range(3)]
        self.blocks[1].trainable = False

    def build(self, shape):
        for block in self.blocks:
            block.build(shape)

    def call(self, x):
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return x

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                prediction = self(x, training=True)
            slope = inner.gradient(prediction, x)
            loss = self.compute_loss(x, y, prediction)
            loss += 0.1 * self.compute_loss(x, tf.zeros_like(slope), slope)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss}


def penalised():
    model = Penalised()
    model.build((None, 4, 8))
    model.compile("adamw", "mse")
    return model


@pytest.mark.nightly
def test_blocks_that_are_shared_frozen_and_differentiated_twice(float64):
    """Fails if a weight that is used again, has no gradient, or is differentiated in two tapes is
    replaced by another one, or by what is made later."""
    x = np.random.default_rng(0).normal(size=(8, 4, 8))
    batches = [(x[i : i + 4], np.flip(x[i : i + 4], 2)) for i in (0, 4)]
    expected = train(penalised, batches)
    assert max_difference(expected, train(penalised, batches, on(fsdp=2))) <= 1e-9


WIDE = {"vocab_size": 64, "max_positions": 32, "hidden_size": 64, "num_heads": 4, "num_layers": 4}


@pytest.mark.parametrize("policy", usual(["float32", "mixed_bfloat16"], "float32"))
def test_gathered_weights_of_blocks_are_let_go(policy):
    """Fails if the forward pass's weights live until the backward pass, or what is made of them
    does: weights in 16 bits."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        rows = [held(reshard) for reshard in (False, True)]
    finally:
        keras.config.set_dtype_policy(before)
    kept, let_go = (row["communication"] + row["other"] for row in rows)
    # 12 matrices of 64 x 64 in each block. When most is held, as the logits are made or a little
    # later, there are no more than the last block's, of which some may be done with in both.
    matrices = 12 * 64**2 * (4 if policy == "float32" else 2)
    assert let_go <= 1.1 * matrices
    assert 2.6 * matrices <= kept - let_go <= 4.1 * matrices
    # Nothing else is computed again. One step is a program of a rank and the other one partitioned,
    # which keeps a sixth more.
    assert rows[1]["activations"] == pytest.approx(rows[0]["activations"], rel=0.2)


def held(reshard):
    """What a device holds in the fullest moment of a step, by kind."""
    strategy = on(reshard, fsdp=2)
    with strategy.scope():
        model = GPT(GPTConfig(**WIDE))
        optimizer = keras.optimizers.SGD()
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    tokens = tf.TensorSpec([64, 32], tf.int32)
    return memory.report(model, optimizer, step=step, batch=(tokens, tokens))[0]


def test_a_model_without_blocks_says_so():
    """Fails if the option does nothing in silence."""
    with on(fsdp=2).scope():
        model = keras.Sequential([layers.Dense(4), layers.LayerNormalization()])
        model.build([None, 4])
        model.compile("sgd", "mse")
    x = np.ones((4, 4), "float32")
    with pytest.warns(UserWarning, match="no effect on 'sequential.*', because no two"):
        model.train_on_batch(x, x)


@pytest.mark.parametrize(
    ("axes", "value", "words"),
    [
        ({"data": 2}, True, "fsdp axis, which has size 1"),
        ({"fsdp": 2, "pipe": 2}, True, "without a pipe axis"),
        ({"fsdp": 2}, "yes", "is True or False. Received: 'yes'"),
    ],
)
def test_options_that_mean_nothing(axes, value, words):
    """Fails if the option is taken where it has no effect, or is no option."""
    with pytest.raises(ValueError, match=words):
        on(value, **axes)
