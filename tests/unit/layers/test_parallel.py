"""Each layer on slices of its weights against the same layer, with the same weights, on one device.

All layers run in one program for each mesh: forward, the gradient of the input, and the gradients
of the weights after the step's own reduction. In float64 sums in another order differ by 1e-16
relative; 1e-11 allows for the few hundred terms of these sums, and no wrong one passes it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import usual

from llmos_tf import Mesh, collectives
from llmos_tf.layers import (
    Dense,
    FeedForward,
    LayerNorm,
    PositionEmbedding,
    RMSNorm,
    SelfAttention,
    TensorRegion,
    TokenEmbedding,
    in_stream,
    sharded_cross_entropy,
)
from llmos_tf.sharding import Layout
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.gradients.sync import sync_gradients

TOLERANCE = 1e-11
# 4 divides neither the vocabulary nor the two key-value heads.
ROWS, LENGTH, WIDTH, HEADS, KV_HEADS, VOCABULARY, INNER = 2, 8, 12, 4, 2, 30, 20

LAYOUTS = {
    "up/kernel": (None, "tensor"),
    "up/bias": ("tensor",),
    "down/kernel": ("tensor", None),
    "attention/query_key_value/kernel": (None, None, "tensor", None),
    "attention/query_key_value/bias": (None, "tensor", None),
    "(grouped_|shared_)?attention/output/kernel": ("tensor", None, None),
    "(grouped|shared)_attention/query/kernel": (None, "tensor", None),
    "feed_forward/up/kernel": (None, "tensor"),
    "feed_forward/up/bias": ("tensor",),
    "gated_feed_forward/up/kernel": (None, None, "tensor"),
    "(gated_)?feed_forward/down/kernel": ("tensor", None),
    "token_embedding/table": Layout(("tensor", None), uneven=True),
}


class Case(NamedTuple):
    """A layer, or two that make a region, and how the residual stream passes through."""

    layers: tuple[keras.layers.Layer, ...]
    call: Callable[[tf.Tensor], tf.Tensor]


def make_cases():
    """Makes all layers, with weights that are the same in every scope and nowhere zero."""
    up, down = Dense((WIDTH,), (INNER,), name="up"), Dense((INNER,), (WIDTH,), name="down")

    def column_then_row(x):
        region = TensorRegion(up.kernel)
        y = region.leave(down(up.add_bias(up(region.enter(x)))))
        in_stream(down.bias)
        return down.add_bias(y)

    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, LENGTH))
    embedding = TokenEmbedding(VOCABULARY, WIDTH, name="token_embedding")
    whole_embedding = TokenEmbedding(VOCABULARY, WIDTH, name="whole_embedding")
    single = {
        "attention": SelfAttention(WIDTH, HEADS, head_dim=6, name="attention"),
        "grouped_attention": SelfAttention(
            WIDTH,
            HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=6,
            use_bias=False,
            rope_theta=100.0,
            name="grouped_attention",
        ),
        # Of three key-value heads a rank's query heads need two, or one.
        "shared_attention": SelfAttention(
            WIDTH, 12, num_kv_heads=3, head_dim=2, use_bias=False, name="shared_attention"
        ),
        # Not in the table: whole on every rank, also where positions are split around it.
        "whole_attention": SelfAttention(WIDTH, HEADS, head_dim=6, name="whole_attention"),
        "feed_forward": FeedForward(WIDTH, INNER, name="feed_forward"),
        "gated_feed_forward": FeedForward(
            WIDTH, INNER, "silu", gated=True, use_bias=False, name="gated_feed_forward"
        ),
        "position_embedding": PositionEmbedding(LENGTH + 3, WIDTH, name="position_embedding"),
        "layer_norm": LayerNorm(name="layer_norm"),
        "rms_norm": RMSNorm(name="rms_norm"),
    }
    cases = {name: Case((layer,), layer) for name, layer in single.items()}
    cases["dense"] = Case((up, down), column_then_row)
    # What comes in only adds to the embedding, so that the gradient has one.
    cases["token_embedding"] = Case((embedding,), lambda x: x + embedding(tf.constant(tokens)))
    cases["whole_embedding"] = Case(
        (whole_embedding,), lambda x: x * whole_embedding(tf.constant(tokens))
    )
    rng = np.random.default_rng(2)
    for case in cases.values():
        for layer in case.layers:
            layer.build((None, None, WIDTH))
            layer.set_weights([rng.normal(size=w.shape) for w in layer.weights])
    return cases


def logits_of(cases):
    """The output layer, by the table of the embedding: its result is not of the stream."""
    return cases["token_embedding"].layers[0].logits


def inputs():
    rng = np.random.default_rng(3)
    x = tf.constant(rng.normal(size=(ROWS, LENGTH, WIDTH)))
    cotangent = tf.constant(rng.normal(size=(ROWS, LENGTH, WIDTH)))
    logits_cotangent = tf.constant(rng.normal(size=(ROWS, LENGTH, VOCABULARY)))
    labels = tf.constant(rng.integers(0, VOCABULARY, (ROWS, LENGTH)), tf.int32)
    return x, cotangent, logits_cotangent, labels


def enter_stream(x):
    program = current_program()
    split = program is not None and program.sequence_parallel
    return collectives.split_to_axis(x, "tensor", 1) if split else x


def leave_stream(x):
    program = current_program()
    split = program is not None and program.sequence_parallel
    return collectives.gather_from_axis(x, "tensor", 1) if split else x


def measure(cases):
    """Output, gradient of the input and of each weight, of every layer, as full tensors."""
    x, cotangent, logits_cotangent, labels = inputs()
    results = {}
    for name, case in cases.items():
        weights = [weight for layer in case.layers for weight in layer.trainable_weights]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = leave_stream(case.call(enter_stream(x)))
            loss = tf.reduce_sum(y * cotangent)
        results[name] = (y, *_full_gradients(tape.gradient(loss, [x, *weights]), weights))
    table = cases["token_embedding"].layers[0].table
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = logits_of(cases)(enter_stream(x))
        loss = tf.reduce_sum(y * logits_cotangent)
    results["logits"] = (y, *_full_gradients(tape.gradient(loss, [x, table]), [table]))
    with tf.GradientTape() as tape:
        tape.watch(x)
        losses = _losses(cases, enter_stream(x), labels)
        loss = tf.reduce_sum(losses * cotangent[..., 0])
    results["losses"] = (losses, *_full_gradients(tape.gradient(loss, [x, table]), [table]))
    return results


def _losses(cases, stream, labels):
    program = current_program()
    if program is None:
        logits = logits_of(cases)(stream)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    with program.having(sharded_logits=True, logits_axis=None):
        logits = logits_of(cases)(stream)
        assert logits.shape[-1] == -(-VOCABULARY // collectives.axis_size("tensor"))
        return sharded_cross_entropy(labels, logits, program.logits_axis)


def _full_gradients(gradients, weights):
    program = current_program()
    x_gradient, *gradients = gradients
    if program is None:
        return [x_gradient, *gradients]
    stored = [weight.value for weight in weights]
    parts = sync_gradients(program, gradients, stored)
    return [
        x_gradient,
        *(
            variable.layout.full_from_part(part, tuple(variable.shape), program.mesh)
            for variable, part in zip(stored, parts, strict=True)
        ),
    ]


@functools.cache
def one_device():
    return measure(make_cases())


@pytest.mark.parametrize(
    ("size", "sequence_parallel"),
    usual(itertools.product([2, 4], [False, True]), (2, True), (4, False)),
)
def test_layers_compute_on_slices_what_they_compute_whole(float64, size, sequence_parallel):
    """Fails for a region that is entered or left by the wrong collective, a bias that each rank
    adds, a head, column or token taken from another rank, a weight in the stream whose gradient is
    not summed over the positions, or padding of the vocabulary that takes part."""
    strategy = MeshStrategy(
        Mesh(tensor=size), layout_map=LAYOUTS, sequence_parallel=sequence_parallel
    )
    with strategy.scope():
        cases = make_cases()
    results = tf.function(lambda: strategy.run(lambda: measure(cases)), autograph=False)()
    assert results.keys() == one_device().keys()
    for name, expected in one_device().items():
        for i, (actual, value) in enumerate(zip(results[name], expected, strict=True)):
            np.testing.assert_allclose(
                actual, tf.convert_to_tensor(value), atol=TOLERANCE, err_msg=f"{name} {i}"
            )
