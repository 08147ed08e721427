"""Any Keras model is a pipeline with the results of one device, in float64.

What `fit`, `evaluate` and `predict` say is compared number by number, and every weight. The
tolerance is that of `test_parity`. Rows are 29 in batches of 8 where nothing else is said: the last
batch has 5, which neither microbatches nor replicas divide.
"""

import contextlib
import functools
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import layers
from lanes import usual
from references import build_optimizer, shared

from llmos_tf import Mesh
from llmos_tf.strategies import MeshStrategy

TOLERANCE = 1e-9
BATCH, ROWS = 8, 29

MESHES = {
    "pipe2": Mesh(pipe=2),
    "pipe4": Mesh(pipe=4),
    "pipe2-data2": Mesh(pipe=2, data=2),
    "pipe2-fsdp2": Mesh(pipe=2, fsdp=2),
}
PIPE2, PIPE4, DATA2, FSDP2 = MESHES

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 8)), RNG.normal(size=(32, 3))
TOKENS = RNG.integers(0, 20, (32, 6))
# 0 is padding, at the end of half of the sequences.
TOKENS[::2, 4:] = 0
CLASSES, WEIGHTS = RNG.integers(0, 3, 32), RNG.random(32)


class Case(NamedTuple):
    """A compiled model, its data, and what else `fit` is given; on these meshes."""

    build: object
    x: object = X[:ROWS]
    y: object = Y[:ROWS]
    fit: object = None
    meshes: object = (PIPE2,)
    options: object = None


def compiled(model, optimizer=None, loss="mse", **options):
    model.compile(optimizer or keras.optimizers.AdamW(0.01), loss, **options)
    return model


def chain(num_layers=3, optimizer=None, kinds=None, **options):
    """`Dense` layers one after another."""
    hidden = [layers.Dense(16, "tanh", **(kinds or {})) for _ in range(num_layers)]
    model = keras.Sequential([keras.Input([8]), *hidden, layers.Dense(3)])
    return compiled(model, optimizer and optimizer(), **options)


def skipping():
    """What the first layer makes is used on every later stage; one layer is called on two."""
    inputs = keras.Input([8])
    a = layers.Dense(16, "tanh")(inputs)
    shared = layers.Dense(16, "tanh")
    b = shared(layers.Dense(16, "tanh")(a))
    c = shared(layers.Add()([a, b]))
    x = layers.Concatenate()([layers.Dense(16, "tanh")(c), a, inputs])
    return compiled(keras.Model(inputs, layers.Dense(3)(x)), metrics=["mae"])


def two_of_all():
    """Two inputs, one with a mask, and two outputs, each with losses and metrics of its own."""
    numbers = keras.Input([8], name="numbers")
    tokens = keras.Input([6], dtype="int32", name="tokens")
    text = layers.Embedding(20, 8, mask_zero=True)(tokens)
    text = layers.LSTM(8)(layers.LSTM(8, return_sequences=True)(text))
    a = layers.Dense(16, "tanh")(layers.Concatenate()([layers.Dense(16)(numbers), text]))
    far = layers.Dense(3, name="far")(a)
    sign = layers.Dense(1, "sigmoid", name="sign")(layers.Concatenate()([a, text]))
    model = keras.Model({"numbers": numbers, "tokens": tokens}, {"far": far, "sign": sign})
    model.compile(
        keras.optimizers.AdamW(0.01),
        {"far": "mse", "sign": "binary_crossentropy"},
        loss_weights={"far": 0.3, "sign": 1.0},
        metrics={"far": ["mae"], "sign": ["accuracy", "binary_crossentropy"]},
        weighted_metrics={"far": ["mse"], "sign": ["accuracy"]},
    )
    return model


def tagging():
    """A mask that goes through the whole model to the loss and the metrics."""
    tokens = keras.Input([6], dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True)(tokens)
    x = layers.LSTM(8, return_sequences=True)(layers.Dense(8)(x))
    return compiled(keras.Model(tokens, layers.Dense(3)(x)), weighted_metrics=["mae"])


class Activity(layers.Layer):
    """Adds to the loss what a stage in the middle computes."""

    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


def regularized():
    model = keras.Sequential(
        [
            keras.Input([8]),
            layers.Dense(16, "tanh", kernel_regularizer="l2"),
            Activity(),
            layers.Dense(16, "tanh", bias_regularizer="l1"),
            layers.Dense(16, trainable=False),
            layers.Dense(3, kernel_regularizer="l2"),
        ]
    )
    return compiled(model)


def frozen_stage():
    model = chain(4)
    for layer in model.layers[:3]:
        layer.trainable = False
    return compiled(model, keras.optimizers.AdamW(0.01, global_clipnorm=0.1))


def looked_up():
    """Tables of which single rows are used, one of them on the last stage."""
    tokens = keras.Input([6], dtype="int32")
    x = layers.Dense(8, "tanh")(layers.Dense(8)(layers.Embedding(20, 8)(tokens)))
    x = layers.Flatten()(layers.Add()([x, layers.Embedding(20, 8)(tokens)]))
    return compiled(keras.Model(tokens, layers.Dense(3)(x)))


def classifying():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return chain(loss=loss, weighted_metrics=["accuracy"])


def nested():
    inner = keras.Sequential([keras.Input([16]), layers.Dense(16, "tanh"), layers.Dense(16)])
    inputs = keras.Input([8])
    return compiled(keras.Model(inputs, layers.Dense(3)(inner(layers.Dense(16)(inputs)))))


def rematerialised():
    with keras.RematScope(mode="full"):
        return chain(4)


def attending():
    inputs = keras.Input([6], dtype="int32")
    x = layers.Embedding(20, 8)(inputs)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(y, y, use_causal_mask=True)])
        y = layers.Dense(16, "gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(8)(y)])
    return compiled(keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x))))


def halving(**options):
    """AdamW with a rate that a schedule computes without rounding to float32."""
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.03125, 0.0625, 0.015625])
    return keras.optimizers.AdamW(rate, **options)


TWO = {"numbers": X[:ROWS], "tokens": TOKENS[:ROWS]}
TWO_Y = {"far": Y[:ROWS], "sign": CLASSES[:ROWS, None] % 2}
TWO_FIT = {"sample_weight": {"far": WEIGHTS[:ROWS], "sign": WEIGHTS[::-1][:ROWS]}}
ADAM = keras.optimizers.AdamW
CASES = {
    "skips": Case(skipping, meshes=(PIPE2, PIPE4, DATA2)),
    # The last batch has fewer rows than microbatches, and than replicas.
    "small": Case(functools.partial(chain, metrics=["mae"]), X[:25], Y[:25], meshes=(PIPE2, DATA2)),
    "two": Case(two_of_all, TWO, TWO_Y, TWO_FIT, (PIPE4, DATA2)),
    "mask": Case(tagging, TOKENS[:ROWS], RNG.normal(size=(ROWS, 6, 3))),
    "classes": Case(
        classifying,
        y=CLASSES[:ROWS],
        fit={"class_weight": {0: 1.0, 1: 2.0, 2: 0.5}},
    ),
    "regularizers": Case(regularized, meshes=(PIPE2, DATA2)),
    "frozen": Case(frozen_stage),
    "lookups": Case(looked_up, TOKENS[:ROWS], meshes=(PIPE2, FSDP2)),
    "nested": Case(nested, meshes=(PIPE4,)),
    "attention": Case(attending, TOKENS[:ROWS], options={"schedule": "zb-v"}),
    "accumulation": Case(
        functools.partial(chain, 3, lambda: ADAM(0.01, gradient_accumulation_steps=2)),
        meshes=(DATA2,),
    ),
    "averages": Case(
        functools.partial(
            chain,
            3,
            lambda: halving(use_ema=True, ema_overwrite_frequency=2, global_clipnorm=0.1),
        )
    ),
    "loss-scale": Case(
        functools.partial(
            chain,
            3,
            lambda: keras.optimizers.LossScaleOptimizer(
                ADAM(0.01, clipnorm=0.05), initial_scale=8.0, dynamic_growth_steps=2
            ),
        ),
        meshes=(DATA2,),
    ),
    "several-steps": Case(functools.partial(chain, steps_per_execution=3), meshes=(DATA2,)),
    "compiled": Case(functools.partial(chain, jit_compile=True), X, Y),
    "remat": Case(rematerialised, X, Y),
    "placed": Case(
        functools.partial(chain, kinds={"name": None}), options={"stage_of": {"dense_2": 0}}
    ),
}


def make(build, strategy=None):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        return build()


def results_of(case, strategy=None):
    """All that Keras says of a model that it trains, evaluates and runs."""
    model = make(case.build, strategy)
    if strategy is None:
        build_optimizer(model)
    options = {"batch_size": BATCH, "verbose": 0}
    history = model.fit(case.x, case.y, epochs=2, shuffle=False, **options, **(case.fit or {}))
    weight = (case.fit or {}).get("sample_weight")
    return {
        "history": history.history,
        "evaluate": model.evaluate(
            case.x, case.y, sample_weight=weight, return_dict=True, **options
        ),
        "predict": model.predict(case.x, **options),
        "weights": model.get_weights(),
    }


@shared
def one_device(name):
    return results_of(CASES[name])


def assert_close(actual, expected):
    keras.tree.assert_same_structure(actual, expected)
    pairs = zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=0)


CELLS = [(name, mesh) for name, case in CASES.items() for mesh in case.meshes]
# The same models on another pipeline. Attention, and a layer that is placed by name, are in
# test_pipeline.py, scaled losses in test_pipeline_state.py, regularizers in test_regularizers.py;
# of averages, several steps and rematerialisation, tests/equivalence has rows on other meshes.
NIGHTLY = {
    ("skips", PIPE2),
    ("skips", DATA2),
    ("small", PIPE2),
    ("two", PIPE4),
    ("regularizers", PIPE2),
    ("regularizers", DATA2),
    ("several-steps", DATA2),
    ("remat", PIPE2),
    ("loss-scale", DATA2),
    ("averages", PIPE2),
    ("lookups", PIPE2),
    ("attention", PIPE2),
    ("placed", PIPE2),
}


@pytest.mark.parametrize(("name", "mesh"), usual(CELLS, *(c for c in CELLS if c not in NIGHTLY)))
def test_model_has_the_results_of_one_device(float64, name, mesh):
    """Fails for what crosses a cut and is lost or counted twice on its way back, a term of the loss
    that is added by every stage or microbatch, rows that are lent and counted, an update that does
    not know the other stages, a metric without masks, weights or logits."""
    strategy = MeshStrategy(MESHES[mesh], num_microbatches=4, **(CASES[name].options or {}))
    assert_close(results_of(CASES[name], strategy), one_device(name))
