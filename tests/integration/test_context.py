"""The context axis: every mesh trains GPT and Llama to the weights of one device, in float64, and a
device keeps for the backward pass only what belongs to its positions.

Sums in another order differ by 1e-16 relative; Adam's division by the root of a tiny second moment
magnifies that to some 1e-14. 1e-9 is far above both and far below any wrong factor, mask or axis.
"""

import functools
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import usual
from references import shared

from llmos_tf import Mesh
from llmos_tf.inference import generate
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig, Llama, LlamaConfig
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import MeshStrategy
from llmos_tf.testing import max_difference, train
from llmos_tf.training import make_train_step

TOLERANCE = 1e-9
ROWS, LENGTH, VOCABULARY, STEPS = 4, 16, 30, 5

MODELS = {
    "gpt": lambda: GPT(
        GPTConfig(
            vocab_size=VOCABULARY, max_positions=LENGTH, hidden_size=16, num_heads=4, num_layers=1
        )
    ),
    # Fewer key-value heads than ranks on a context axis of 4.
    "llama": lambda: Llama(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_positions=LENGTH,
            hidden_size=16,
            num_heads=4,
            num_kv_heads=2,
            num_layers=2,
            feed_forward_size=24,
        )
    ),
}
RING, ULYSSES = {"context_method": "ring"}, {"context_method": "ulysses"}
SEQUENCE_PARALLEL = {"sequence_parallel": True}
EIGHT = Mesh(fsdp=2, context=2, tensor=2)
MESHES = {
    "context2-ring": (Mesh(context=2), RING),
    "context2-ulysses": (Mesh(context=2), ULYSSES),
    "context4-ring": (Mesh(context=4), RING),
    "context4-ulysses": (Mesh(context=4), ULYSSES),
    "data2-context2-ring": (Mesh(data=2, context=2), {**RING, "zero_stage": 1}),
    "data2-context2-ulysses": (Mesh(data=2, context=2), ULYSSES),
    "fsdp2-context2-tensor2-ring": (EIGHT, RING),
    "fsdp2-context2-tensor2-ulysses": (EIGHT, ULYSSES),
    "fsdp2-context2-tensor2-ring-sp": (EIGHT, {**RING, **SEQUENCE_PARALLEL}),
    "fsdp2-context2-tensor2-ulysses-sp": (EIGHT, {**ULYSSES, **SEQUENCE_PARALLEL}),
    # A model without experts has its stream split over the axis all the same.
    "expert2": (Mesh(expert=2), {}),
    "expert2-context2-ring": (Mesh(expert=2, context=2), RING),
}


@functools.cache
def batches():
    """Rows of several documents, and of unequal weight, so that a mean of means shows."""
    rng = np.random.default_rng(0)
    shape = (STEPS, ROWS, LENGTH)
    tokens, labels = (rng.integers(0, VOCABULARY, shape).astype("int32") for _ in range(2))
    documents = np.sort(rng.integers(0, 3, shape), axis=-1).astype("int32")
    weights = rng.random(shape) * (rng.random(shape) > 0.3)
    weights[:, : ROWS // 2] *= 0.2
    return tokens, labels, weights, documents


def build(model, metrics=None):
    made = MODELS[model]()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    made.compile(optimizer, TokenCrossEntropy(), metrics=metrics)
    return made


@shared
def one_device(model):
    rows = list(zip(*batches()[:3], strict=True))
    return train(lambda: build(model), rows)._replace(model=None)


# Each way to attend on two meshes, with each model, and beside every other axis.
CASES = usual(
    itertools.product(MODELS, MESHES),
    ("gpt", "context2-ring"),
    ("gpt", "context4-ulysses"),
    ("gpt", "data2-context2-ring"),
    ("gpt", "fsdp2-context2-tensor2-ring-sp"),
    ("gpt", "expert2-context2-ring"),
    ("llama", "context2-ulysses"),
    ("llama", "context2-ring"),
)


@pytest.mark.parametrize(("model", "mesh"), CASES)
def test_mesh_has_the_weights_of_one_device(float64, model, mesh):
    """Fails for a position, key, head or label of another rank, a gradient that is not summed over
    the axes of the stream or summed twice, or losses that are not put together in their order."""
    strategy = MeshStrategy(MESHES[mesh][0], **MESHES[mesh][1])
    result = train(lambda: build(model), list(zip(*batches()[:3], strict=True)), strategy)
    assert strategy.num_traces == 1
    assert max_difference(one_device(model), result) <= TOLERANCE
    np.testing.assert_allclose(result.losses, one_device(model).losses, atol=TOLERANCE, rtol=0)


def fitted_on_documents(strategy, metrics=None):
    """Weights after `fit` on rows of several documents, then what `evaluate`, `predict` give."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    tokens, labels, weights, documents = (x.reshape(-1, LENGTH) for x in batches())
    with strategy.scope():
        model = build("llama", metrics)
    x = {"tokens": tokens, "segment_ids": documents}
    options = {"sample_weight": weights, "batch_size": ROWS, "verbose": 0}
    model.fit(x, labels, shuffle=False, **options)
    scores = model.evaluate(x, labels, **options)
    logits = model.predict({k: v[:ROWS] for k, v in x.items()}, batch_size=ROWS, verbose=0)
    return model.get_weights(), scores, logits


def test_documents_and_metrics(float64):
    """Fails if a token sees another document's, if the documents do not travel with their keys, or
    if whole logits, which a metric needs, are put together in another order."""
    metrics = ["sparse_categorical_accuracy"]
    expected = fitted_on_documents(tf.distribute.get_strategy(), metrics)
    actual = fitted_on_documents(MeshStrategy(Mesh(context=2)), metrics)
    for one, other in zip(tf.nest.flatten(expected), tf.nest.flatten(actual), strict=True):
        np.testing.assert_allclose(other, one, atol=TOLERANCE, rtol=0)
    tokens = batches()[0].reshape(-1, LENGTH)[:ROWS]
    model = build("llama")
    model.set_weights(expected[0])
    assert np.abs(expected[2] - model(tokens)).max() > 1e-3


def test_a_document_in_a_row_is_as_alone(float64):
    """Fails if segment ids leave a token something of its neighbours: rotary positions are
    relative, so only what is seen matters."""
    keras.utils.set_random_seed(0)
    model = MODELS["llama"]()
    tokens = batches()[0][0, :1]
    documents = np.repeat([[4, 1, 7]], [5, 8, 3], axis=1)
    packed = model(tokens, segment_ids=documents)
    for begin, end in ((0, 5), (5, 13), (13, 16)):
        alone = model(tokens[:, begin:end])
        np.testing.assert_allclose(packed[:, begin:end], alone, atol=1e-12)


def test_generation_is_that_of_one_device(float64):
    """Fails if a cache is split over positions, of which a step has one."""

    def generated(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = MODELS["llama"]()
        return generate(model, batches()[0][0, :2, :5], max_new_tokens=4)

    expected = generated(tf.distribute.get_strategy())
    np.testing.assert_array_equal(generated(MeshStrategy(Mesh(context=2))), expected)


def test_static_rows_are_split_over_experts(float64):
    """Fails if rows that an expert axis divides, as a step by hand has them, are computed e times,
    or put together wrongly."""
    tokens, labels, weights, _ = batches()

    def trained(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = MODELS["gpt"]()
            optimizer = keras.optimizers.SGD(0.1)
        shapes = []
        original = model.blocks[0].call
        model.blocks[0].call = lambda x, **more: shapes.append(x.shape) or original(x, **more)
        step = make_train_step(model, optimizer, TokenCrossEntropy())
        for batch in zip(tokens, labels, weights, strict=True):
            step(*(tf.constant(x) for x in batch))
        return model.get_weights(), shapes

    expected, _ = trained(tf.distribute.get_strategy())
    actual, shapes = trained(MeshStrategy(Mesh(expert=2, context=2)))
    assert shapes == [(ROWS // 2, LENGTH // 2, 16)]
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(other, one, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({}, 12, r"context=4.* a multiple of 8\. Received: 12\. 16 would"),
        # Each of two tensor ranks has two heads.
        ({"context_method": "ulysses"}, 16, "2 query heads to 4 ranks.* context_method='ring'"),
    ],
)
def test_what_cannot_be_split_is_refused(float64, options, length, message):
    """Fails if `fit` does not say which number is wrong and what would work, before it traces."""
    strategy = MeshStrategy(Mesh(context=4, tensor=2), **options)
    with strategy.scope():
        model = build("gpt")
    tokens = np.zeros((2, length), "int32")
    with pytest.raises(ValueError, match=message):
        model.fit(tokens, tokens, verbose=0)
    assert strategy.num_traces == 0


@pytest.mark.parametrize("axis", ["context", "expert"])
def test_a_model_that_knows_nothing_of_an_axis_is_refused(axis):
    """Fails if a mesh axis is accepted along which every rank would compute the same."""
    strategy = MeshStrategy(Mesh(**{axis: 2}))
    named = f"has the axis {axis}, and no model uses it"
    with pytest.raises(ValueError, match=named), strategy.scope():
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


# --- memory ---------------------------------------------------------------------------------------


def kept_bytes(model, tokens):
    """Bytes that a rank keeps from the forward pass of a model for the backward pass.

    Of the graph of one step: what ops of the backward pass use of those of the forward pass, values
    of variables and constants apart. A reshaped tensor is the same bytes.
    """
    graph = tf.compat.v1.get_default_graph()
    loss = TokenCrossEntropy()
    begin = len(graph.get_operations())
    with tf.GradientTape() as tape:
        value = loss(tokens, model(tokens, training=True))
    end = len(graph.get_operations())
    tape.gradient(value, model.trainable_variables)
    operations = graph.get_operations()
    forward, kept = set(operations[begin:end]), {}
    for op in operations[end:]:
        for tensor in map(stored_as, op.inputs):
            if tensor.op in forward and tensor.op.type not in ("ReadVariableOp", "Const"):
                kept[tensor.ref()] = tensor.shape.num_elements() * tensor.dtype.size
    return sum(kept.values())


def stored_as(tensor):
    """The tensor whose bytes a tensor is."""
    while tensor.op.type in ("Identity", "IdentityN", "Reshape", "ExpandDims", "Squeeze"):
        same = tensor.value_index if tensor.op.type == "IdentityN" else 0
        tensor = tensor.op.inputs[same]
    return tensor


def small_config(length, num_heads=4):
    return GPTConfig(
        vocab_size=16, max_positions=length, hidden_size=8, num_heads=num_heads, num_layers=1
    )


def kept_of(length, strategy, **sizes):
    """`kept_bytes` of a small model for one row on a mesh."""
    keras.backend.clear_session()
    found = []
    with strategy.scope():
        model = GPT(small_config(length, **sizes))

    def program(tokens):
        with current_program().having(sharded_logits=True):
            found.append(kept_bytes(model, tokens))

    tokens = tf.zeros([1, length], tf.int32)
    tf.function(lambda: strategy.run(program, (tokens,)), autograph=False).get_concrete_function()
    return found[0]


@pytest.mark.parametrize("method", usual(["ring", "ulysses"], "ring"))
def test_what_a_device_keeps_falls_with_the_axis(method):
    """Fails if a rank keeps keys of other ranks, or a matrix of scores, for the backward pass."""
    length = 4096
    whole = kept_of(length, MeshStrategy(Mesh()))
    for ways in (2, 4):
        part = kept_of(length, MeshStrategy(Mesh(context=ways), context_method=method))
        # The labels' losses of all positions, and tables of positions, are on every rank.
        assert part / whole == pytest.approx(1 / ways, rel=0.1)
    # Linear in the length: twice the positions, twice the bytes, not four times.
    assert kept_of(2 * length, MeshStrategy(Mesh())) / whole == pytest.approx(2, rel=0.01)


@pytest.mark.nightly
def test_32k_tokens_on_eight_devices():
    """Fails if a sequence of 32,768 tokens does not train, or takes a device more than an eighth of
    what one device keeps of it."""
    length, sizes = 32768, {"num_heads": 1}
    strategy = MeshStrategy(Mesh(context=8))
    kept = kept_of(length, strategy, **sizes)
    assert kept / kept_of(length, MeshStrategy(Mesh()), **sizes) == pytest.approx(1 / 8, rel=0.1)
    tokens = np.random.default_rng(0).integers(0, 16, (1, length + 1)).astype("int32")

    def losses(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = GPT(small_config(length, **sizes))
            model.compile(keras.optimizers.SGD(1.0), TokenCrossEntropy())
        return [model.train_on_batch(tokens[:, :-1], tokens[:, 1:]) for _ in range(2)]

    # In float32 sums of 32,768 terms in another order differ by some 1e-6.
    expected = losses(tf.distribute.get_strategy())
    assert expected[1] < expected[0]
    np.testing.assert_allclose(losses(strategy), expected, rtol=1e-5)
