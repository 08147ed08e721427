"""Losses, weights, masks, several inputs and outputs, metrics, and steps of the user's own."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from equivalence.columns import ANY_MODEL, PAIR_MODEL
from equivalence.data import BATCH, LABELS, NUMBERS, PADDED, TARGETS, TOKENS, WEIGHTS, fit, mlp
from equivalence.features import Feature, parity


def sample_weights():
    """Fails if rows are averaged with the weights of their rank's rows only."""
    model = mlp()
    model.compile("adam", "mse", metrics=["mae"], weighted_metrics=["mae"])
    validation = (NUMBERS[:11], TARGETS[:11], WEIGHTS[:11])
    return model, lambda: fit(model, sample_weight=WEIGHTS, validation_data=validation)


def class_weights():
    """Fails if weights of classes are lost on the way to the ranks."""
    model = mlp()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model, lambda: fit(model, 1, NUMBERS, LABELS, class_weight={0: 1.0, 1: 5.0})


def masks():
    """Fails if the entries that count are averaged per rank: ranks have another number each."""
    model = keras.Sequential(
        [layers.Embedding(12, 4, mask_zero=True), layers.Dense(12, activation="softmax")]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    # Of each token: Keras cannot join weights of rows with a mask, on one device neither.
    weights = np.tile(WEIGHTS[:, np.newaxis], 5)
    return model, lambda: fit(model, 1, PADDED, TOKENS, sample_weight=weights)


def inputs_and_outputs():
    """Fails if the losses of a dict of outputs are reduced otherwise than a single one."""
    numbers = keras.Input((4,), name="numbers")
    tokens = keras.Input((5,), name="tokens", dtype="int32")
    words = layers.Flatten()(layers.Embedding(12, 2)(tokens))
    x = layers.Dense(3, activation="tanh")(layers.Concatenate()([numbers, words]))
    outputs = {
        "kind": layers.Dense(2, activation="softmax", name="kind")(x),
        "value": layers.Dense(2, name="value")(x),
    }
    model = keras.Model({"numbers": numbers, "tokens": tokens}, outputs)
    model.compile(
        "adam",
        {"kind": "sparse_categorical_crossentropy", "value": "mse"},
        loss_weights={"kind": 1.0, "value": 0.3},
        metrics={"kind": ["accuracy"], "value": ["mae"]},
    )
    x, y = {"numbers": NUMBERS, "tokens": TOKENS}, {"kind": LABELS, "value": TARGETS}
    weights = {"kind": WEIGHTS, "value": WEIGHTS[::-1]}
    return model, lambda: fit(model, 1, x, y, sample_weight=weights)


def regularizers_and_constraints():
    """Fails if a regularizer counts once for each rank, or a constraint sees a part."""
    model = mlp(
        kernel_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer="l2",
        kernel_constraint="max_norm",
    )
    model.compile(keras.optimizers.SGD(0.3), "mse")
    return model, lambda: fit(model)


class MeanActivity(layers.Layer):
    """Adds the mean square of what passes to the loss."""

    def call(self, x):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
        return x


def added_losses():
    """Fails if a term that a layer has averaged over a rank's rows weighs as the whole batch."""
    model = keras.Sequential([layers.Dense(5, activation="tanh"), MeanActivity(), layers.Dense(2)])
    model.compile("sgd", lambda y, p: keras.ops.mean(keras.ops.abs(y - p)))
    return model, lambda: fit(model)


def many_metrics():
    """Fails if a metric with more state than a sum and a count is averaged over ranks."""
    model = mlp()
    model.compile(
        "adam",
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.AUC(num_thresholds=20, from_logits=True),
            keras.metrics.TruePositives(),
            keras.metrics.RootMeanSquaredError(),
            lambda y, p: keras.ops.mean(keras.ops.abs(y - p)),
        ],
        weighted_metrics=["mae"],
    )
    y = (TARGETS > 0).astype("float64")
    return model, lambda: fit(model, 1, NUMBERS, y, sample_weight=WEIGHTS)


class OwnStep(keras.Model):
    """The train step of Keras's guide, with metrics of all kinds of values."""

    def __init__(self):
        super().__init__()
        self.network = mlp()
        self.sums = {
            name: keras.metrics.Sum(name=f"sum_{name}")
            for name in ("loss", "scaled", "rows", "added", "weighted", "count")
        }
        self.means = {
            name: keras.metrics.Mean(name=f"mean_{name}")
            for name in ("loss", "weighted", "by_hand", "rows")
        }

    @property
    def metrics(self):
        return [*self.sums.values(), *self.means.values()]

    def call(self, x):
        return self.network(x)

    def train_step(self, data):
        x, y, weight = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = keras.ops.sqrt(self.compute_loss(y=y, y_pred=y_pred))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        error = keras.ops.sum(keras.ops.abs(y - y_pred), axis=-1)
        self.sums["loss"].update_state(loss)
        self.sums["scaled"].update_state(loss, sample_weight=0.5)
        self.sums["rows"].update_state(error)
        self.sums["added"].update_state(keras.ops.sum(error))
        self.sums["weighted"].update_state(error, sample_weight=weight)
        self.sums["count"].update_state(1.0)
        self.means["loss"].update_state(loss)
        self.means["weighted"].update_state(error, sample_weight=weight)
        self.means["by_hand"].update_state(keras.ops.mean(error))
        self.means["rows"].update_state(error)
        return {metric.name: metric.result() for metric in self.metrics}


def own_train_step():
    """Fails if the loss is a share of it, `Sum` counts the loss once for each rank, does not add
    up what ranks have summed of their rows, or `Mean` weighs ranks alike that have unlike rows."""
    model = OwnStep()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    seen = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(dict(logs))
    )

    def work():
        results = fit(model, sample_weight=WEIGHTS, callbacks=[note])
        return {**results, "batches": seen}

    return model, work


def batch_by_batch():
    """Fails if a global batch given by hand is used once for each rank."""
    model = mlp()
    model.compile("adam", "mse", metrics=["mae"])

    def work():
        batches = [
            model.train_on_batch(NUMBERS[i : i + BATCH], TARGETS[i : i + BATCH], return_dict=True)
            for i in range(0, 5 * BATCH, BATCH)
        ]
        evaluation = model.test_on_batch(NUMBERS, TARGETS, return_dict=True)
        prediction = model.predict_on_batch(NUMBERS[:7])
        return {"batches": batches, "evaluation": evaluation, "prediction": prediction}

    return model, work


class LossInMetric(keras.metrics.Metric):
    """A metric that computes a loss, as KerasHub's perplexity does."""

    def __init__(self, reduction):
        super().__init__(name=reduction)
        self.loss = keras.losses.MeanSquaredError(reduction=reduction)
        self.total = self.add_weight(initializer="zeros", name="total")
        self.count = self.add_weight(initializer="zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        rows = keras.ops.cast(keras.ops.shape(y_true)[0], self.dtype)
        loss = self.loss(y_true, y_pred, sample_weight)
        self.total.assign_add(loss if self.loss.reduction == "sum" else loss * rows)
        self.count.assign_add(rows)

    def result(self):
        return keras.ops.exp(self.total / self.count)


def losses_in_metrics():
    """Fails if a loss that a metric computes counts once for each rank, or as all ranks' loss."""
    model = mlp()
    whole = keras.losses.MeanAbsoluteError()
    kinds = ("sum", "sum_over_batch_size")
    metrics = [*map(LossInMetric, kinds), lambda y, p: whole(y, p)]
    model.compile("adam", "mse", metrics=metrics)
    return model, lambda: {**fit(model), "evaluate": model.evaluate(NUMBERS, TARGETS, verbose=0)}


def pipeline_of_tf_data():
    """Fails if a dataset that repeats is split otherwise than arrays, or loses a step."""
    model = mlp()
    model.compile("adam", "mse")
    data = tf.data.Dataset.from_tensor_slices((NUMBERS, TARGETS, WEIGHTS)).batch(BATCH).repeat()

    def work():
        return {"history": model.fit(data, epochs=2, steps_per_epoch=4, verbose=0).history}

    return model, work


def row(title, script, columns=PAIR_MODEL):
    return Feature(title, parity(script), columns)


FEATURES = [
    row("weights of samples", sample_weights),
    row("weights of classes", class_weights),
    row("masks, and weights of samples", masks, ANY_MODEL),
    row("several inputs and outputs", inputs_and_outputs, ANY_MODEL),
    row("regularizers and a constraint", regularizers_and_constraints),
    row("`add_loss`; a loss that averages by itself", added_losses, ANY_MODEL),
    row("AUC, counts, a metric that averages by itself", many_metrics),
    row("losses inside metrics", losses_in_metrics),
    row("own `train_step`; `Sum` and `Mean` of losses and rows", own_train_step),
    row("`train_on_batch`, `test_on_batch`, `predict_on_batch`", batch_by_batch),
    row("`tf.data` with `steps_per_epoch`", pipeline_of_tf_data),
]
