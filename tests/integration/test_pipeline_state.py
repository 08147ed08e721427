"""What a pipeline draws, averages, saves, and does step by step, in float64."""

import contextlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from lanes import usual

from llmos_tf import Mesh, memory
from llmos_tf.checkpoint import restore_checkpoint, save_checkpoint
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.pipeline.pipeline import Pipeline
from llmos_tf.training import make_loss_step, make_train_step

TOLERANCE = 1e-9
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 8)), RNG.normal(size=(32, 3))
OPTIONS = {"batch_size": 8, "shuffle": False, "verbose": 0}


def pipeline(stages=2, num_microbatches=4, **options):
    return MeshStrategy(Mesh(pipe=stages), num_microbatches=num_microbatches, **options)


def make(build, strategy=None):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        return build()


def chain(kind=keras.Model):
    inputs = keras.Input([8])
    x = layers.Dense(16, "tanh", kernel_regularizer="l2")(inputs)
    x = layers.Dense(16, "tanh")(layers.Dense(16, "tanh")(x))
    model = kind(inputs, layers.Dense(3)(x))
    metrics = None if kind is ByHand else ["mae"]
    model.compile(keras.optimizers.AdamW(0.01), "mse", metrics=metrics)
    return model


def assert_same_weights(one, other):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, rtol=0)


# --- random numbers and statistics ------------------------------------------------------------


def dropping():
    """Two layers that drop, on two stages, and the masks of both."""
    inputs = keras.Input([64])
    kinds = {"kernel_initializer": "identity", "use_bias": False}
    first = layers.Dropout(0.5)(layers.Dense(64, **kinds)(inputs))
    second = layers.Dropout(0.5)(layers.Dense(64, **kinds)(inputs))
    model = keras.Model(inputs, [first, second])
    model.compile("sgd", ["mse", "mse"])
    return model


def masks(strategy, steps=1):
    """What each step keeps: [step][layer] -> bool [microbatch, row, feature]."""
    model = make(dropping, strategy)

    def step(x):
        return Pipeline(model, lambda x: (None, model(x, training=True)), x, None).outputs()

    step.model = model
    run = tf.function(lambda x: strategy.run(step, args=(x,)), autograph=False)
    ones = tf.ones([8, 64], tf.float64)
    results = [[y.numpy() > 0 for y in run(ones)] for _ in range(steps)]
    return [[y.reshape(4, 2, 64) for y in layers] for layers in results]


def test_dropout_masks(float64):
    """Fails if microbatches, stages, rows or steps share a mask, if a run cannot be repeated, or if
    activations are not kept at the rate."""
    runs = [masks(pipeline(), steps=2) for _ in range(2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    # Every row of every microbatch, layer and step.
    flat = np.reshape(runs[0], (-1, 64))
    agreement = (flat[:, None] == flat[None]).mean(-1)[~np.eye(len(flat), dtype=bool)]
    # Of two that are independent half agrees, within 5 standard deviations of 1/16 each.
    assert agreement.max() < 0.5 + 5 / 16
    assert abs(flat.mean() - 0.5) < 5 * 0.5 / np.sqrt(flat.size)


def test_normalization_is_by_microbatch(float64):
    """Fails if moving averages are those of the last microbatch only, or if rows of uneven
    microbatches do not weigh alike."""
    momentum = 0.9

    def build():
        norm = layers.BatchNormalization(momentum=momentum)
        model = keras.Sequential([keras.Input([8]), norm, layers.Dense(4), layers.Dense(3)])
        model.compile("sgd", "mse")
        return model

    for rows in (8, 6):
        model = make(build, pipeline())
        # Changes nothing, and is not the end of the process.
        model.train_on_batch(X[:0], Y[:0])
        model.train_on_batch(X[:rows], Y[:rows])
        cuts = [i * rows // 4 for i in range(1, 4)]
        parts = np.split(X[:rows], cuts)
        share = [len(part) / rows for part in parts]
        mean = np.average([part.mean(0) for part in parts], axis=0, weights=share)
        variance = np.average([part.var(0) for part in parts], axis=0, weights=share)
        norm = model.layers[0]
        np.testing.assert_allclose(norm.moving_mean.numpy(), (1 - momentum) * mean, atol=1e-9)
        expected = momentum + (1 - momentum) * variance
        np.testing.assert_allclose(norm.moving_variance.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("policy", usual(["mixed_float16", "mixed_bfloat16"], "mixed_float16"))
def test_mixed_precision(policy):
    """Fails if what crosses a cut loses its type, or a loss that is scaled is not unscaled."""
    keras.config.set_dtype_policy(policy)
    x, y = X.astype("float32"), Y.astype("float32")
    one, other = make(chain), make(chain, pipeline())
    losses = [m.fit(x, y, epochs=2, **OPTIONS).history["loss"] for m in (one, other)]
    # Gradients of 16 bits with 8 or 11 digits; a wrong scale or a lost term is a factor.
    np.testing.assert_allclose(*losses, rtol=2e-2)
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-2)


# --- by hand ----------------------------------------------------------------------------------


def test_on_batch(float64):
    """Fails if arrays, or batches of another size each time or none, are no batch for a
    pipeline."""
    one, other = make(chain), make(chain, pipeline())
    for rows in (8, 5, 0, 3):
        for method in ("train_on_batch", "test_on_batch"):
            logs = [getattr(m, method)(X[:rows], Y[:rows]) for m in (one, other)]
            np.testing.assert_allclose(*logs, atol=TOLERANCE)
        predicted = [m.predict_on_batch(X[:rows]) for m in (one, other)]
        np.testing.assert_allclose(*predicted, atol=TOLERANCE)
    # And the model itself, called outside of any step.
    np.testing.assert_allclose(one(X), other(X), atol=TOLERANCE)
    assert_same_weights(one, other)


def test_positions_of_any_number(float64):
    """Fails if a batch of other lengths than the last one is refused, or a row of it counts as one
    of another length."""

    def build():
        model = keras.Sequential([keras.Input([None, 8]), layers.Dense(8, "tanh"), layers.Dense(3)])
        model.compile(keras.optimizers.AdamW(0.01), "mse")
        return model

    def losses(strategy):
        model = make(build, strategy)
        step = make_train_step(model, model.optimizer, "mse")
        rows = [np.resize(X, (8, length, 8)) for length in (3, 4, 5)]
        batches = [(x, x[..., :3]) for x in rows]
        values = [model.train_on_batch(*batch) for batch in batches]
        return [*values, *(float(step(*batch)) for batch in batches)]

    np.testing.assert_allclose(losses(pipeline()), losses(None), atol=TOLERANCE)


@pytest.mark.parametrize(
    "mesh", [pytest.param(Mesh(pipe=2), marks=pytest.mark.nightly), Mesh(pipe=2, data=2)], ids=str
)
def test_train_step_of_a_custom_loop(float64, mesh):
    """Fails if the step runs the whole model on each stage, forgets a regularizer, or counts the
    rows of uneven microbatches wrongly."""

    def losses(strategy):
        model = make(chain, strategy)
        step = make_train_step(model, model.optimizer, "mse")
        held_out = make_loss_step(model, "mse")
        values = [step(X[i:j], Y[i:j]) for i, j in ((0, 8), (8, 16), (16, 21), (21, 22))]
        return model, [float(v) for v in (*values, held_out(X[:8], Y[:8]))]

    strategy = MeshStrategy(mesh, num_microbatches=4)
    (one, expected), (other, actual) = losses(None), losses(strategy)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    assert_same_weights(one, other)
    assert strategy.extended.num_pipelines > 0
    assert other.layers[-1].kernel.value.layout.stages == (1,)


def test_custom_loop_of_a_language_model(float64):
    """Fails if logits that are cut over `tensor` are not left so in a pipeline's loss."""
    config = GPTConfig(
        vocab_size=30, max_positions=8, hidden_size=16, num_heads=4, num_layers=2, dropout=0.0
    )
    tokens, weights = RNG.integers(0, 30, (3, 8, 9)), RNG.random((3, 8, 8))

    def run(strategy):
        model, optimizer = make(lambda: (GPT(config), keras.optimizers.AdamW(0.01)), strategy)
        step = make_train_step(model, optimizer, TokenCrossEntropy())
        batches = zip(tokens[..., :-1], tokens[..., 1:], weights, strict=True)
        return model, [float(step(*batch)) for batch in batches]

    strategy = MeshStrategy(Mesh(pipe=2, tensor=2), num_microbatches=2)
    (one, expected), (other, actual) = run(None), run(strategy)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    assert_same_weights(one, other)


class ByHand(keras.Model):
    """A step that does not call Keras's."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"of_hand": loss}


class Around(keras.Model):
    """Steps that do."""

    def train_step(self, data):
        return {**super().train_step(data), "more": 1.0}

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        logs = super().compute_metrics(x, y, y_pred, sample_weight)
        return {**logs, "size": keras.ops.max(keras.ops.abs(y_pred)) * 0.0}


def test_own_train_step(float64):
    """Fails if a step of the user's own is wrong on a pipeline, or is slow and says nothing."""
    one, other = make(lambda: chain(ByHand)), make(lambda: chain(ByHand), pipeline())
    one.fit(X, Y, epochs=2, **OPTIONS)
    with pytest.warns(UserWarning, match=r"train_step of ByHand .* no pipeline") as caught:
        other.fit(X, Y, epochs=2, **OPTIONS)
    assert len(caught) == 1
    assert_same_weights(one, other)
    one, other = make(lambda: chain(Around)), make(lambda: chain(Around), pipeline())
    histories = [m.fit(X, Y, epochs=2, **OPTIONS).history for m in (one, other)]
    assert histories[0].keys() == histories[1].keys()
    for name in histories[0]:
        np.testing.assert_allclose(*(h[name] for h in histories), atol=TOLERANCE)
    assert_same_weights(one, other)


# --- saving -----------------------------------------------------------------------------------


def test_what_is_saved_goes_on_anywhere(float64, tmp_path):
    """Fails if a file lacks what lies on another stage, or if loading puts it on the wrong one."""
    one, piped = make(chain), make(chain, pipeline())
    for model in (one, piped):
        model.fit(X, Y, **OPTIONS)
    piped.save(tmp_path / "model.keras")
    from_pipe = save_checkpoint(tmp_path / "pipe", piped, step=4)
    from_one = save_checkpoint(tmp_path / "one", one, step=4)

    loaded = [keras.saving.load_model(tmp_path / "model.keras")]
    with pipeline(4, schedule="gpipe").scope():
        loaded.append(keras.saving.load_model(tmp_path / "model.keras"))
    for checkpoint, strategy in ((from_pipe, None), (from_one, pipeline(4))):
        loaded.append(make(chain, strategy))
        restore_checkpoint(checkpoint, loaded[-1])
    # Into one whose weights lie on their stages already.
    loaded.append(make(chain, pipeline()))
    loaded[-1].fit(X, Y, **OPTIONS)
    restore_checkpoint(from_one, loaded[-1])
    one.fit(X, Y, **OPTIONS)
    for model in loaded:
        model.fit(X, Y, **OPTIONS)
        assert_same_weights(one, model)


def test_callbacks(float64, tmp_path):
    """Fails if validation, stopping, best weights or a rate that is set do not reach all stages."""

    def run(strategy):
        model = make(chain, strategy)
        path = str(tmp_path / "{epoch}.weights.h5")
        callbacks = [
            keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1, factor=0.5),
            keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        ]
        keep = {"validation_data": (X[24:31], Y[24:31]), "validation_batch_size": 4}
        history = model.fit(X[:24], Y[:24], epochs=4, callbacks=callbacks, **keep, **OPTIONS)
        return model, history.history

    (one, expected), (other, actual) = run(None), run(pipeline())
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], atol=TOLERANCE)
    assert_same_weights(one, other)


def test_report_after_a_step(float64):
    """Fails if a stage stores weights or optimizer state of the other one."""
    model = make(chain, pipeline())
    model.fit(X, Y, **OPTIONS)
    rows = memory.report(model)
    mine = [sum(v.shape.num_elements() for v in s) for s in _by_stage(model.trainable_variables)]
    assert [row["parameters"] for row in rows] == [8 * n for n in mine]
    # Adam has two numbers for each, and a step and a rate besides.
    assert [row["optimizer"] for row in rows] == [2 * 8 * n + 16 for n in mine]


def _by_stage(variables):
    stages = [v.value.layout.stages for v in variables]
    return [[v for v, s in zip(variables, stages, strict=True) if i in s] for i in range(2)]


@pytest.mark.nightly
@pytest.mark.skipif(sys.version_info < (3, 11), reason="KerasHub 0.32 needs Python 3.11.")
def test_keras_hub(float64):
    """Fails if a task around a backbone is cut elsewhere than the backbone, or cannot write."""
    import keras_hub as hub  # noqa: PLC0415 (not there on Python 3.10)

    tokens = RNG.integers(1, 20, (12, 7))
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones([12, 6], bool)}

    def build():
        backbone = hub.models.GPT2Backbone(
            vocabulary_size=20,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            dropout=0.0,
            max_sequence_length=8,
        )
        model = hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.AdamW(0.01), loss, sampler="greedy")
        return model

    results = []
    for strategy in (None, pipeline()):
        model = make(build, strategy)
        history = model.fit(inputs, tokens[:, 1:], **OPTIONS).history["loss"]
        blocks = model.backbone.transformer_layers
        if strategy is not None:
            stages = [block.weights[0].value.layout.stages for block in blocks]
            assert stages == [(0,), (1,)]
        prompt = {"token_ids": tokens[:2, :6], "padding_mask": np.arange(6) < [[3], [3]]}
        written = model.generate(prompt, stop_token_ids=None)["token_ids"]
        results.append([history, *model.get_weights(), np.asarray(written)])
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
