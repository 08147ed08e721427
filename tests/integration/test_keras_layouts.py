"""Models of plain Keras compute on shards under a layout map, with the results of one device.

Each script makes and compiles a model from Keras's layers alone. Under a mesh it gets a table of
layouts over `tensor`, which cuts what the layers can compute on slices of, and what they have to
gather. Everything is in float64, where sums in another order differ by 1e-16 relative. 33 rows in
batches of 8 are five steps, and the last one has one row, fewer than a mesh has ways to split the
batch.
"""

import contextlib
import functools
import inspect
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from references import build_optimizer, shared

from llmos_tf import Mesh
from llmos_tf.strategies import MeshStrategy

TOLERANCE = 1e-9
ROWS, BATCH, UNEVEN, LONELY = 33, 8, 13, 16
VOCABULARY, LENGTH, WIDTH, HEADS, HEAD = 16, 8, 8, 4, 2

_rng = np.random.default_rng(0)
TOKENS = _rng.integers(0, VOCABULARY, (ROWS, LENGTH))
# Sequences of unequal length, for masks.
PADDED = TOKENS * (np.arange(LENGTH) < _rng.integers(2, LENGTH + 1, (ROWS, 1)))
SIGNALS = _rng.normal(size=(ROWS, LENGTH, WIDTH))
# A mask for each head, in which every position sees itself.
VISIBLE = _rng.integers(0, 2, (ROWS, HEADS, LENGTH, LENGTH)) | np.eye(LENGTH, dtype=int)
LABELS = _rng.integers(0, 4, ROWS)

MESHES = {
    "tensor2": Mesh(tensor=2),
    "tensor4": Mesh(tensor=4),
    "data2,tensor2": Mesh(data=2, tensor=2),
    "fsdp2,tensor2": Mesh(fsdp=2, tensor=2),
}
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}
# Biases that are not zero: one that is added on every rank would not show.
BIASES = {"bias_initializer": "normal"}


# --- the scripts: a model, its inputs and its labels ---------------------------------------------


class Decoder(keras.Model):
    """A transformer with tied embeddings, which is built by its first batch."""

    def __init__(self):
        super().__init__(name="decoder")
        self.tokens = layers.ReversibleEmbedding(
            VOCABULARY, WIDTH, logit_soft_cap=5.0, name="tokens"
        )
        self.positions = layers.Embedding(LENGTH, WIDTH, name="positions")
        self.attention = layers.MultiHeadAttention(HEADS, HEAD, name="attention", **BIASES)
        self.grouped = layers.GroupQueryAttention(HEAD, HEADS, 2, name="grouped", **BIASES)
        self.norm = layers.LayerNormalization(name="norm")
        self.up = layers.Dense(12, activation="gelu", name="up", **BIASES)
        self.down = layers.Dense(WIDTH, name="down", **BIASES)

    def call(self, tokens):
        x = self.tokens(tokens) + self.positions(ops.cumsum(ops.ones_like(tokens), 1) - 1)
        x = x + self.attention(x, x, use_causal_mask=True)
        x = x + self.grouped(x, x, use_causal_mask=True)
        x = self.norm(x)
        x = x + self.down(self.up(x))
        return self.tokens(x, reverse=True)


def decoder():
    """One lookup of sparse rows alone, and one beside the dense gradient of the logits."""
    return Decoder(), TOKENS, np.roll(TOKENS, -1, 1)


BY_HEADS = {
    "(.*/)?(attention|cross)/(query|key|value|gate)/kernel": (None, "tensor", None),
    "(.*/)?(attention|cross)/(query|key|value|gate)/bias": ("tensor", None),
    "(.*/)?(attention|cross)/attention_output/kernel": ("tensor", None, None),
}
DECODER = {
    **BY_HEADS,
    "decoder/(tokens|positions)/embeddings": ("tensor", None),
    # Two heads of keys and values, computed whole: keys by rows, values with a whole kernel.
    "decoder/grouped/query/kernel": (None, "tensor", None),
    "decoder/grouped/key/kernel": ("tensor", None, None),
    "decoder/grouped/attention_output/kernel": ("tensor", None, None),
    "decoder/norm/(gamma|beta)": ("tensor",),
    "decoder/up/kernel": (None, "tensor"),
    "decoder/up/bias": ("tensor",),
    "decoder/down/kernel": ("tensor", None),
}
# The other way round, as far as there is one; heads of keys and values are cut too.
TURNED = {
    **BY_HEADS,
    "decoder/(tokens|positions)/embeddings": (None, "tensor"),
    "decoder/grouped/(query|key|value)/kernel": (None, "tensor", None),
    "decoder/grouped/(query|key|value)/bias": ("tensor", None),
    "decoder/grouped/attention_output/kernel": ("tensor", None, None),
    "decoder/grouped/attention_output/bias": ("tensor",),
    "decoder/up/kernel": ("tensor", None),
    "decoder/down/kernel": (None, "tensor"),
}


def attend_across():
    """Attention to another sequence: masks by Keras and by hand, scores, gates, regularizers."""
    words = keras.Input((LENGTH,), dtype="int32", name="words")
    signals = keras.Input((LENGTH, WIDTH), name="signals")
    visible = keras.Input((HEADS, LENGTH, LENGTH), dtype="int32", name="visible")
    options = {**BIASES, "kernel_regularizer": "l2"}
    if "use_gate" in inspect.signature(layers.MultiHeadAttention).parameters:
        options["use_gate"] = True
    x = layers.Embedding(VOCABULARY, WIDTH, mask_zero=True, name="words_embedding")(words)
    y, scores = layers.MultiHeadAttention(HEADS, HEAD, 3, name="attention", **options)(
        signals, signals[:, ::-1], attention_mask=visible, return_attention_scores=True
    )
    cross = layers.GroupQueryAttention(HEAD, HEADS, HEADS, name="cross", **options)
    z = cross(y, signals, attention_mask=visible[:, 0])
    # Its keys are cut in a way that the heads are not.
    last = layers.MultiHeadAttention(HEADS, HEAD, name="last")
    z = layers.GlobalAveragePooling1D()(z + last(x, z, use_causal_mask=True))
    spread = ops.mean(ops.square(scores), axis=(2, 3))
    out = layers.Dense(4, name="classify", **BIASES)(ops.concatenate([z, spread], -1))
    inputs = {"words": words, "signals": signals, "visible": visible}
    model = keras.Model(inputs, out)
    return model, {"words": PADDED, "signals": SIGNALS, "visible": VISIBLE}, LABELS


ACROSS = {
    **BY_HEADS,
    "words_embedding/embeddings": ("tensor", None),
    "last/(query|value)/kernel": (None, "tensor", None),
    "last/key/kernel": (None, None, "tensor"),
    "last/attention_output/kernel": ("tensor", None, None),
    "classify/kernel": (None, "tensor"),
}


def equations():
    """Products of every form, each with its own place for what is cut."""
    inputs = keras.Input((LENGTH, WIDTH))
    dense = functools.partial(layers.EinsumDense, **BIASES)
    x = dense("abc,cd->abd", (LENGTH, 12), "relu", "d", name="columns")(inputs)
    x = dense("abc,cde->abde", (LENGTH, 2, 4), "softmax", "de", name="mixing")(x)
    x = dense("abde,dec->abc", (LENGTH, WIDTH), bias_axes="c", name="rows")(x)
    # A half of its bias is as long as the last dim.
    x = dense("ab...,bc->ac...", 2 * WIDTH, "tanh", "c", name="ellipsis_columns")(x)
    x = dense("ab...,bc->ac...", LENGTH, "tanh", name="ellipsis_rows")(x)
    x = x + dense("abc,bc->abc", (LENGTH, WIDTH), bias_axes="bc", name="both")(x)
    x = x + dense("...x,xy->...y", WIDTH, None, "y", name="leading_ellipsis")(x)
    x = layers.Dense(12, "softmax", name="softmax", **BIASES)(x)
    x = layers.Dense(8, lambda x: x - ops.max(x, -1, keepdims=True), name="own")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(4, name="rows_of_matrix", **BIASES)(x)
    return keras.Model(inputs, x), SIGNALS, LABELS


EQUATIONS = {
    "columns/kernel": (None, "tensor"),
    "mixing/kernel": (None, None, "tensor"),
    "mixing/bias": (None, "tensor"),
    "rows/kernel": (None, "tensor", None),
    "rows/bias": ("tensor",),
    "ellipsis_columns/kernel": (None, "tensor"),
    "ellipsis_columns/bias": ("tensor", None),
    "ellipsis_rows/kernel": ("tensor", None),
    "both/kernel": (None, "tensor"),
    "both/bias": ("tensor", None),
    "leading_ellipsis/kernel": (None, "tensor"),
    "softmax/kernel": (None, "tensor"),
    "softmax/bias": ("tensor",),
    "own/kernel": (None, "tensor"),
    "rows_of_matrix/kernel": ("tensor", None),
}


class Standardized(layers.Dense):
    """A layer of the user's own, which makes its kernel of what it stores."""

    @property
    def kernel(self):
        return self._kernel - ops.mean(self._kernel, 0)


class Doubled(layers.Dense):
    """A layer of the user's own, around Keras's product."""

    def call(self, inputs):
        return 2 * super().call(inputs)


def any_layer():
    """Layers that know nothing of slices, with variables that are cut; and one used twice."""
    twice = Doubled(WIDTH, name="twice", kernel_regularizer="l2")
    model = keras.Sequential(
        [
            keras.Input((LENGTH, WIDTH)),
            layers.Conv1D(WIDTH, 3, name="conv", **BIASES),
            layers.BatchNormalization(synchronized=True, name="norm"),
            twice,
            layers.LSTM(WIDTH, return_sequences=True, name="lstm"),
            layers.TimeDistributed(layers.Dense(WIDTH, name="distributed"), name="time"),
            twice,
            layers.GRU(4, name="gru"),
            Standardized(4, name="standardized"),
        ],
        name="any",
    )
    return model, SIGNALS, LABELS


ANY_LAYER = {
    "any/conv/kernel": (None, None, "tensor"),
    "any/conv/bias": ("tensor",),
    "any/norm/gamma": ("tensor",),
    "any/twice/kernel": ("tensor", None),
    "any/lstm/lstm_cell/(recurrent_)?kernel": (None, "tensor"),
    "any/gru/gru_cell/kernel": ("tensor", None),
    "any/gru/gru_cell/bias": (None, "tensor"),
    "any/time/(distributed/)?kernel": (None, "tensor"),
    "any/standardized/kernel": ("tensor", None),
}


# --- running them --------------------------------------------------------------------------------


def strategy_of(mesh, table):
    """A strategy with a table, for `data2,tensor2` as KerasHub's layout maps have it."""
    if mesh != "data2,tensor2":
        return MeshStrategy(MESHES[mesh], layout_map=table)
    devices = keras.distribution.list_devices("cpu")[:4]
    device_mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), devices)
    layout_map = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in table.items():
        layout_map[pattern] = tuple({"tensor": "model", None: "batch"}[axis] for axis in axes)
    return MeshStrategy(MESHES[mesh], layout_map=layout_map)


def make(script, optimizer, strategy=None):
    """A script's compiled model with its data, under a strategy's scope or on one device."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model, x, y = script()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(OPTIMIZERS[optimizer](), loss, metrics=["accuracy"])
    if strategy is None:
        build_optimizer(model)
    return model, x, y


def run(script, optimizer, strategy=None):
    """Trains a script's model; what it then says."""
    model, x, y = make(script, optimizer, strategy)
    fit = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    results = {
        "history": fit.history,
        "evaluation": model.evaluate(x, y, batch_size=UNEVEN, verbose=0, return_dict=True),
        "prediction": model.predict(x, batch_size=LONELY, verbose=0),
        "weights": model.get_weights(),
    }
    return model, results


@shared
def one_device(script, optimizer):
    return run(script, optimizer)[1]


def assert_same(actual, expected):
    """Compares results number by number."""
    keras.tree.assert_same_structure(actual, expected)
    pairs = zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)


CASES = [
    (decoder, DECODER, "adamw", "tensor4"),
    (decoder, DECODER, "sgd", "data2,tensor2"),
    (decoder, DECODER, "adamw", "fsdp2,tensor2"),
    (decoder, TURNED, "adamw", "tensor2"),
    (decoder, TURNED, "sgd", "fsdp2,tensor2"),
    (attend_across, ACROSS, "adamw", "data2,tensor2"),
    (attend_across, ACROSS, "sgd", "tensor2"),
    (equations, EQUATIONS, "sgd", "tensor4"),
    (equations, EQUATIONS, "adamw", "fsdp2,tensor2"),
    (any_layer, ANY_LAYER, "adamw", "data2,tensor2"),
]
# Each table has a cell of plain gradient descent, which hides no factor, with every change.
NIGHTLY = [CASES[i] for i in (0, 1, 2, 3, 5, 8)]


@pytest.mark.parametrize(
    ("script", "table", "optimizer", "mesh"),
    [
        pytest.param(
            *case,
            id=f"{case[0].__name__}-{case[2]}-{case[3]}",
            marks=pytest.mark.nightly if case in NIGHTLY else [],
        )
        for case in CASES
    ],
)
def test_a_layout_map_gives_the_results_of_one_device(float64, script, table, optimizer, mesh):
    """Fails if a slice is multiplied, gathered, summed or activated in a wrong place, if a bias is
    added by every rank, if a lookup's rows are not those of one device, if a rank attends with
    another one's heads or mask, or if a gradient is that of a slice alone."""
    _, results = run(script, optimizer, strategy_of(mesh, table))
    assert_same(results, one_device(script, optimizer))


def test_a_model_is_saved_whole_and_loaded_onto_another_mesh(float64, tmp_path):
    """Fails if what is saved is a slice, or if layouts are not found for a loaded model."""
    model, x, y = make(attend_across, "sgd", strategy_of("tensor2", ACROSS))
    model.train_on_batch(x, y)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    one = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(one.predict(x, verbose=0), expected, atol=TOLERANCE)
    keras.backend.clear_session()
    with strategy_of("data2,tensor2", ACROSS).scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=TOLERANCE)
    kernel = loaded.get_layer("attention").query_dense.kernel.value
    assert kernel.values[0].shape == (WIDTH, HEADS // 2, HEAD)
    states = zip(one.optimizer.variables, loaded.optimizer.variables, strict=True)
    assert all((a.numpy() == b.numpy()).all() for a, b in states)


@pytest.mark.nightly
def test_mixed_precision(float64):
    """Fails if a slice is not cast to the compute dtype, or a gradient not back."""

    def mixed():
        keras.config.set_dtype_policy("mixed_bfloat16")
        return decoder()

    model, results = run(mixed, "adamw", strategy_of("tensor2", DECODER))
    assert model.up.compute_dtype == "bfloat16"
    assert {w.dtype.name for w in results["weights"]} == {"float32"}
    keras.config.set_dtype_policy("float64")
    loss = one_device(decoder, "adamw")["history"]["loss"]
    np.testing.assert_allclose(results["history"]["loss"], loss, rtol=2e-2)


# --- what a rank does ----------------------------------------------------------------------------


def ops_of_a_step(strategy, script):
    """The ops of one rank's program that computes the gradients of a loss."""
    model, x, _ = make(script, "sgd", strategy)
    found = []

    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.constant(x[:BATCH])))
        gradients = tape.gradient(loss, model.trainable_variables)
        found.extend(tf.compat.v1.get_default_graph().get_operations())
        return tf.add_n([tf.reduce_sum(tf.convert_to_tensor(g)) for g in gradients])

    tf.function(lambda: strategy.run(step), autograph=False).get_concrete_function()
    return found


def multiplications(op):
    """Number of products in a matrix product or einsum."""
    shapes = [tensor.shape for tensor in op.inputs]
    if op.type == "Einsum":
        specs = op.get_attr("equation").decode().split("->")[0].split(",")
        lengths = {
            letter: length
            for spec, shape in zip(specs, shapes, strict=True)
            for letter, length in zip(spec, shape, strict=True)
        }
        return math.prod(lengths.values())
    if op.type in ("MatMul", "BatchMatMulV2"):
        transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
        return math.prod(op.outputs[0].shape) * shapes[0][-2 if transposed else -1]
    return 0


def only_cut():
    """A model all of whose products can be cut in four."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    tokens = layers.ReversibleEmbedding(VOCABULARY, WIDTH, name="tokens")
    x = tokens(inputs)
    x = layers.MultiHeadAttention(HEADS, HEAD, name="attention")(x, x, use_causal_mask=True)
    x = layers.Dense(WIDTH, name="down")(layers.Dense(12, "gelu", name="up")(x))
    return keras.Model(inputs, tokens(x, reverse=True)), TOKENS, TOKENS


ONLY_CUT = {
    **BY_HEADS,
    "tokens/embeddings": ("tensor", None),
    "up/kernel": (None, "tensor"),
    "up/bias": ("tensor",),
    "down/kernel": ("tensor", None),
}


def test_a_rank_computes_its_share(float64):
    """Fails if a layer is computed whole on every rank, or if a kernel is gathered for it."""
    whole = ops_of_a_step(MeshStrategy(Mesh(data=2)), only_cut)
    cut = ops_of_a_step(MeshStrategy(Mesh(tensor=4), layout_map=ONLY_CUT), only_cut)
    work = [sum(map(multiplications, found)) for found in (whole, cut)]
    assert work[0] == 4 * work[1] > 0
    collectives = [op for op in cut if op.type.startswith("Collective")]
    # What is gathered: the feed-forward's output and its gradient, the logits.
    gathered = [op.inputs[0].shape[0] for op in collectives if "Gather" in op.type]
    assert gathered == [3, VOCABULARY // 4, 3]
    # Forward and backward of attention, the end of the feed-forward, the lookup, and backward the
    # logits and the beginning of the feed-forward.
    assert len(collectives) - len(gathered) == 6


def test_dropout_in_attention_draws_for_each_head():
    """Fails if all ranks drop the same of their heads, or if nothing is dropped."""
    kernels = {pattern: axes for pattern, axes in BY_HEADS.items() if "bias" not in pattern}
    strategy = strategy_of("tensor2", kernels)
    with strategy.scope():
        attention = layers.MultiHeadAttention(
            HEADS, HEAD, 1, dropout=0.5, use_bias=False, output_shape=HEADS, name="attention"
        )
        x = ops.ones((4, LENGTH, WIDTH))
        attention(x, x)
        query, key, value, _ = attention.weights
        # All positions weigh alike and all values are one, so a head's sum tells what was dropped.
        same, one = np.zeros(query.shape), np.full(value.shape, 1 / WIDTH)
        attention.set_weights([same, np.zeros(key.shape), one, np.eye(HEADS)[:, np.newaxis]])
    result = strategy.run(lambda: attention(x, x, training=True))
    heads = np.moveaxis(strategy.experimental_local_results(result)[0].numpy(), -1, 0)
    assert all(np.abs(heads[i] - heads[j]).max() > 0 for i in range(HEADS) for j in range(i))
    assert heads.mean() == pytest.approx(1, abs=0.3)
