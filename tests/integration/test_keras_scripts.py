"""Unmodified Keras scripts train under a strategy with the weights of one device.

A script makes and compiles a model as users write it, from Keras alone; the strategy's scope around
that is all that is added. What it does with the model afterwards gives the results to compare:
weights with the non-trainable ones, reported losses and metrics, evaluation and prediction.

Everything is in float64, where sums in another order differ by 1e-16 relative. 33 rows in batches
of 8 are five steps, and the last one has one row, fewer than there are devices.
"""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from lanes import usual
from references import build_optimizer, shared

from llmos_tf import devices
from llmos_tf.strategies import DataParallelStrategy, ZeroStrategy

TOLERANCE = 1e-9
# 33 rows are 13, 13 and 7 rows, or 16, 16 and 1.
ROWS, BATCH, UNEVEN, LONELY = 33, 8, 13, 16

_rng = np.random.default_rng(0)
FEATURES = _rng.normal(size=(ROWS, 6))
IMAGES = _rng.normal(size=(ROWS, 8, 8, 2))
TOKENS = _rng.integers(1, 20, (ROWS, 7))
# Sequences of unequal length, for masks.
PADDED = TOKENS * (np.arange(7) < _rng.integers(2, 8, (ROWS, 1)))
LABELS = _rng.integers(0, 3, ROWS)
BINARY = (LABELS > 0).astype("float64")[:, np.newaxis]
# Rows of the first half weigh little, so that a mean of the replicas' means shows.
WEIGHTS = _rng.random(ROWS) * np.where(np.arange(ROWS) % BATCH < BATCH // 2, 0.2, 1.0)

STRATEGIES = {
    "data2": lambda: DataParallelStrategy(devices.visible_devices()[:2]),
    "data4": lambda: DataParallelStrategy(devices.visible_devices()[:4]),
    "data8": DataParallelStrategy,
    "zero1": lambda: ZeroStrategy(stage=1, devices=devices.visible_devices()[:2]),
    "zero3-2": lambda: ZeroStrategy(stage=3, devices=devices.visible_devices()[:2]),
    "zero3-4": lambda: ZeroStrategy(stage=3, devices=devices.visible_devices()[:4]),
}


def results_of(model, x, y, fit):
    """What a model has learnt and says of a data set, in batches that differ in size."""
    return {
        "history": fit.history,
        "evaluation": model.evaluate(x, y, batch_size=UNEVEN, verbose=0, return_dict=True),
        "prediction": model.predict(x, batch_size=LONELY, verbose=0),
    }


def fit_arrays(model, x, y, epochs=1, **options):
    fit = model.fit(x, y, batch_size=BATCH, shuffle=False, epochs=epochs, verbose=0, **options)
    return results_of(model, x, y, fit)


# --- the scripts ---------------------------------------------------------------------------------


def mlp():
    """Numpy arrays, weights of samples, a regularizer, callbacks that follow what fit reports."""
    model = keras.Sequential(
        [
            layers.Dense(8, activation="relu", kernel_regularizer="l2"),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(
        "adam",
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=["sparse_categorical_crossentropy"],
    )
    batch_losses = []

    def work():
        results = fit_arrays(
            model,
            FEATURES,
            LABELS,
            epochs=3,
            sample_weight=WEIGHTS,
            validation_data=(FEATURES[:11], LABELS[:11], WEIGHTS[:11]),
            callbacks=[
                keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
                keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=1.0),
                keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True),
                keras.callbacks.LambdaCallback(
                    on_train_batch_end=lambda batch, logs: batch_losses.append(dict(logs))
                ),
            ],
        )
        return {**results, "batches": batch_losses}

    return model, work


def cnn():
    """A tf.data pipeline, synchronized batch normalization, weights of classes."""
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = layers.BatchNormalization(synchronized=True)(x)
    x = layers.ReLU()(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.BatchNormalization(synchronized=True, momentum=0.5)(x)
    model = keras.Model(inputs, layers.Dense(3)(x))
    model.compile(
        "rmsprop",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    def work():
        data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(BATCH)
        fit = model.fit(
            data, validation_data=data.take(2), class_weight={0: 1.0, 1: 3.0, 2: 0.5}, verbose=0
        )
        return results_of(model, IMAGES, LABELS, fit)

    return model, work


class Transformer(keras.Model):
    """Built when it sees the first batch."""

    def __init__(self):
        super().__init__()
        self.embedding = layers.Embedding(20, 8)
        self.attention = layers.MultiHeadAttention(num_heads=2, key_dim=4)
        self.norms = [layers.LayerNormalization(), layers.LayerNormalization()]
        self.feed_forward = [layers.Dense(16, activation="gelu"), layers.Dense(8)]
        self.pool = layers.GlobalAveragePooling1D()
        self.classify = layers.Dense(3)

    def call(self, tokens):
        x = self.embedding(tokens)
        x = self.norms[0](x + self.attention(x, x, use_causal_mask=True))
        x = self.norms[1](x + self.feed_forward[1](self.feed_forward[0](x)))
        return self.classify(self.pool(x))


class Batches(keras.utils.PyDataset):
    """Tokens and labels."""

    def __len__(self):
        return -(-ROWS // BATCH)

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return TOKENS[rows], LABELS[rows], WEIGHTS[rows]


def transformer():
    """A subclassed model without input shape, a PyDataset, an optimizer that sees sparse rows."""
    model = Transformer()
    model.compile(
        "adamw",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

    def work():
        fit = model.fit(Batches(), shuffle=False, verbose=0)
        return results_of(model, TOKENS, LABELS, fit)

    return model, work


def small_batches():
    """Batches of two rows: fewer than devices at every step."""
    model = keras.Sequential([layers.Dense(5, activation="tanh"), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])

    def work():
        fit = model.fit(FEATURES[:9], BINARY[:9], batch_size=2, shuffle=False, verbose=0)
        return results_of(model, FEATURES[:9], BINARY[:9], fit)

    return model, work


def recurrent():
    """Masks that leave another number of tokens on each replica, and variables read in loops."""
    model = keras.Sequential(
        [
            layers.Embedding(20, 5, mask_zero=True),
            layers.LSTM(4, return_sequences=True),
            layers.GRU(3, return_sequences=True),
            layers.Dense(20, activation="softmax"),
        ]
    )
    model.compile("nadam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model, lambda: fit_arrays(model, PADDED, TOKENS)


def many_inputs_and_outputs():
    """Losses in a dict, each with its weight and its metric."""
    numbers = keras.Input((6,), name="numbers")
    words = keras.Input((7,), name="words", dtype="int32")
    embedded = layers.Flatten()(layers.Embedding(20, 3, embeddings_regularizer="l2")(words))
    x = layers.Concatenate()([layers.Dense(4, activation="tanh")(numbers), embedded])
    kind = layers.Dense(3, activation="softmax", name="kind")(x)
    value = layers.Dense(1, name="value")(x)
    model = keras.Model({"numbers": numbers, "words": words}, {"kind": kind, "value": value})
    model.compile(
        "adam",
        {"kind": "sparse_categorical_crossentropy", "value": "mse"},
        loss_weights={"kind": 1.0, "value": 0.3},
        metrics={"kind": ["accuracy"], "value": ["mae"]},
    )
    x, y = {"numbers": FEATURES, "words": TOKENS}, {"kind": LABELS, "value": FEATURES[:, :1]}
    return model, lambda: fit_arrays(model, x, y)


class OwnStep(keras.Model):
    """The train step of Keras's guide; its loss is a function of a loss."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(4, activation="relu"), layers.Dense(1)

    def call(self, x):
        return self.out(self.hidden(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.sqrt(super().compute_loss(x, y, y_pred, sample_weight, training))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


def own_train_step():
    """What a user's own step computes of a loss, and returns of metrics after each batch."""
    model = OwnStep()
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse", metrics=["mae"])
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(dict(logs))
    )

    def work():
        results = fit_arrays(model, FEATURES, BINARY, callbacks=[note])
        return {**results, "batches": seen}

    return model, work


class Adversaries(keras.Model):
    """A generator and a discriminator, each with an optimizer that is first used in the step."""

    def __init__(self):
        super().__init__()
        self.generator = layers.Dense(6)
        self.discriminator = keras.Sequential([layers.Dense(4, activation="relu"), layers.Dense(1)])
        self.tracker = keras.metrics.Mean(name="generator_loss")

    def compile(self, optimizers, loss):
        super().compile()
        self.optimizers, self.loss_fn = optimizers, loss

    @property
    def metrics(self):
        return [self.tracker]

    def call(self, x):
        return self.discriminator(self.generator(x))

    def train_step(self, x):
        ones, zeros = keras.ops.ones_like(x[:, :1]), keras.ops.zeros_like(x[:, :1])
        with tf.GradientTape() as tape:
            both = keras.ops.concatenate([x, self.generator(x)])
            loss = self.loss_fn(keras.ops.concatenate([ones, zeros]), self.discriminator(both))
        self._update(0, self.discriminator, tape, loss)
        with tf.GradientTape() as tape:
            loss = self.loss_fn(ones, self(x))
        self._update(1, self.generator, tape, loss)
        self.tracker.update_state(loss)
        return {"generator_loss": self.tracker.result()}

    def _update(self, number, part, tape, loss):
        gradients = tape.gradient(loss, part.trainable_weights)
        pairs = zip(gradients, part.trainable_weights, strict=True)
        self.optimizers[number].apply_gradients(pairs)


def adversaries():
    """Two optimizers that get their state while the program is traced."""
    model = Adversaries()
    model.compile(
        [keras.optimizers.Adam(0.01), keras.optimizers.Adam(0.02)],
        keras.losses.BinaryCrossentropy(from_logits=True),
    )

    def work():
        fit = model.fit(FEATURES, batch_size=BATCH, shuffle=False, verbose=0)
        return {"history": fit.history, "prediction": model.predict(FEATURES, verbose=0)}

    return model, work


class MeanActivity(layers.Layer):
    """Adds the mean square of what passes to the loss."""

    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


def added_losses():
    """Terms of the loss beside the compiled one, which has averaged by itself."""
    model = keras.Sequential(
        [
            layers.Dense(8, activation="tanh", activity_regularizer="l2", bias_regularizer="l1"),
            MeanActivity(),
            layers.Dense(1, kernel_constraint="max_norm"),
        ]
    )
    model.compile("sgd", lambda y, p: keras.ops.mean(keras.ops.abs(y - p)))
    return model, lambda: fit_arrays(model, FEATURES, BINARY)


def fine_tuning():
    """A frozen layer, a schedule, a second fit, and several steps in one execution."""
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(3)]
    )
    model.layers[0].trainable = False
    rate = keras.optimizers.schedules.ExponentialDecay(0.05, 3, 0.5)
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=3,
    )

    def work():
        fit_arrays(model, FEATURES, LABELS)
        return fit_arrays(model, FEATURES, LABELS)

    return model, work


def every_option_of_an_optimizer():
    """Clipping, accumulation, averages and decay, in the order of one device."""
    model = keras.Sequential([layers.Embedding(20, 4), layers.Flatten(), layers.Dense(3)])
    model.compile(
        keras.optimizers.AdamW(
            0.01,
            weight_decay=0.2,
            global_clipnorm=0.1,
            gradient_accumulation_steps=2,
            use_ema=True,
            ema_momentum=0.9,
            ema_overwrite_frequency=4,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model, lambda: fit_arrays(model, TOKENS, LABELS, epochs=2)


def many_metrics():
    """Metrics whose state is more than a sum and a count."""
    model = keras.Sequential([layers.Dense(4, activation="relu"), layers.Dense(1, "sigmoid")])
    model.compile(
        "adam",
        "binary_crossentropy",
        metrics=[
            "AUC",
            keras.metrics.Precision(),
            keras.metrics.TruePositives(),
            keras.metrics.F1Score(threshold=0.5),
            keras.metrics.RootMeanSquaredError(),
        ],
    )
    return model, lambda: fit_arrays(model, FEATURES, BINARY)


def batch_by_batch():
    """Methods that take one global batch: every row is used once."""
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4, activation="relu"), layers.Dense(1, "sigmoid")]
    )
    metrics = [keras.metrics.TruePositives(thresholds=0.3), "accuracy"]
    model.compile("adam", "binary_crossentropy", metrics=metrics, run_eagerly=True)

    def work():
        batches = [
            model.train_on_batch(FEATURES[i : i + 5], BINARY[i : i + 5], return_dict=True)
            for i in (0, 5, 10)
        ]
        return {
            "batches": batches,
            "evaluation": model.test_on_batch(FEATURES, BINARY, return_dict=True),
            "prediction": model.predict_on_batch(FEATURES[:7]),
        }

    return model, work


class RunningMean(layers.Layer):
    """Keeps a running mean of its input, a float and a whole count of calls."""

    def build(self, shape):
        self.mean = self.add_weight(
            name="mean", shape=(shape[-1],), initializer="zeros", trainable=False
        )
        self.calls = self.add_weight(name="calls", initializer="zeros", trainable=False)
        self.steps = self.add_weight(
            name="steps", dtype="int32", initializer="zeros", trainable=False
        )

    def call(self, x, training=False):
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
            self.calls.assign_add(1.0)
            self.steps.assign_add(1)
        return x - self.mean


def layers_with_state():
    """Statistics that a layer of the user's own keeps of the rows it sees."""
    model = keras.Sequential([RunningMean(), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    return model, lambda: fit_arrays(model, FEATURES, LABELS)


def compiled_outside():
    """Compiled after the scope was left, with objects from outside of it."""
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, "relu"), layers.Dense(1)])

    def work():
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10)),
            keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[keras.metrics.AUC(from_logits=True)],
        )
        return fit_arrays(model, FEATURES, BINARY)

    return model, work


NIGHTLY = [
    *((script, name) for script in (mlp, cnn, transformer) for name in ("data4", "zero3-2")),
    # Each has a row in tests/equivalence.
    (mlp, "zero3-4"),
    (transformer, "data2"),
    (transformer, "zero3-4"),
    (small_batches, "data8"),
    (own_train_step, "zero3-2"),
    (added_losses, "data2"),
    (every_option_of_an_optimizer, "zero1"),
    (every_option_of_an_optimizer, "zero3-2"),
    (compiled_outside, "zero3-2"),
]
PARITY = [
    *(
        (script, name)
        for script in (mlp, cnn, transformer)
        for name in ("data2", "data4", "zero3-2", "zero3-4")
    ),
    (small_batches, "data8"),
    (many_inputs_and_outputs, "data4"),
    (own_train_step, "zero3-2"),
    (adversaries, "data2"),
    (added_losses, "data2"),
    (fine_tuning, "zero3-2"),
    (every_option_of_an_optimizer, "zero1"),
    (every_option_of_an_optimizer, "zero3-2"),
    (many_metrics, "data2"),
    (batch_by_batch, "data4"),
    (layers_with_state, "data2"),
    (compiled_outside, "zero3-2"),
]


def run(script, strategy=None):
    """Runs a script under a strategy's scope, or on one device."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model, work = script()
    if strategy is None:
        build_optimizer(model)
    return {**work(), "weights": model.get_weights()}


@shared
def one_device(script):
    return run(script)


def assert_same(actual, expected, tolerance=TOLERANCE):
    """Compares results number by number."""
    assert actual.keys() == expected.keys()
    for part, values in expected.items():
        keras.tree.assert_same_structure(actual[part], values)
        pairs = zip(keras.tree.flatten(actual[part]), keras.tree.flatten(values), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance, err_msg=part)


@pytest.mark.parametrize(
    ("script", "name"),
    [
        pytest.param(
            *case,
            id=f"{case[0].__name__}-{case[1]}",
            marks=pytest.mark.nightly if case in NIGHTLY else [],
        )
        for case in PARITY
    ],
)
def test_script_has_the_results_of_one_device(float64, script, name):
    """Fails if losses, regularizers, statistics or metrics are averaged over replicas and not over
    rows, if a gradient is summed twice or clipped too early, or if a replica without rows counts.
    """
    assert_same(run(script, STRATEGIES[name]()), one_device(script))


def float32_cnn():
    """Kernels that have no right result for a batch of no rows."""
    model = keras.Sequential(
        [
            layers.SeparableConv2D(4, 3, padding="same"),
            layers.DepthwiseConv2D(3),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(synchronized=True),
            layers.GlobalMaxPooling2D(),
            layers.Dense(3),
        ]
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, lambda: fit_arrays(model, IMAGES.astype("float32"), LABELS)


@pytest.mark.parametrize("name", usual(["data4", "zero3-2"], "data4"))
def test_a_replica_without_rows_computes_on_a_row_that_is_lent(name):
    """Fails if a kernel sees a batch of no rows (TensorFlow's float32 convolutions on the CPU stop,
    the gradient of its depthwise one is left as memory was). Float32: 1e-7 at each of some hundred
    sums that end in one number, with a small model 1e-6 in all."""
    assert_same(run(float32_cnn, STRATEGIES[name]()), one_device(float32_cnn), tolerance=1e-5)


def test_batch_normalization_without_synchronization(float64):
    """Fails if replicas keep moving averages of their own, if they are of a replica's rows, or if a
    replica without rows makes them NaN."""

    def train(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = keras.Sequential([layers.BatchNormalization(momentum=0.5), layers.Dense(1)])
            model.compile("sgd", "mse")
        return model, fit_arrays(model, FEATURES[:9], BINARY[:9])

    (model, results), (_, expected) = (
        train(strategy) for strategy in (STRATEGIES["data4"](), tf.distribute.get_strategy())
    )
    for variable in (model.layers[0].moving_mean, model.layers[0].moving_variance):
        copies = [component.numpy() for component in variable.value.values]
        assert all((copy == copies[0]).all() for copy in copies)
    np.testing.assert_allclose(results["prediction"], expected["prediction"], atol=1e-12)


def test_checkpoint_of_a_mesh_is_one_devices(float64, tmp_path):
    """Fails if what Keras saves under a strategy is a part of the weights, or cannot be loaded."""

    def script():
        model = keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.Dense(1)])
        model.compile("adam", "mse")
        save = keras.callbacks.ModelCheckpoint(tmp_path / "model.keras")
        return model, lambda: fit_arrays(model, FEATURES, BINARY, callbacks=[save])

    results = run(script, STRATEGIES["zero3-4"]())
    loaded = keras.models.load_model(tmp_path / "model.keras")
    prediction = loaded.predict(FEATURES, verbose=0)
    np.testing.assert_allclose(prediction, results["prediction"], atol=TOLERANCE)
    assert int(loaded.optimizer.iterations) == 5
