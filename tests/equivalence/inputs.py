"""What `fit`, `evaluate` and `predict` are given: where batches come from, and what is in them."""

import warnings

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from equivalence.columns import ANY_MODEL
from equivalence.data import BATCH, NUMBERS, ROWS, TARGETS, TOKENS, fit, mlp
from equivalence.features import Feature, parity

QUIET = {"verbose": 0}


def batches(count=6):
    """A generator, which somebody else's look at a batch makes shorter."""
    for i in range(count):
        yield NUMBERS[5 * i : 5 * i + 5], TARGETS[5 * i : 5 * i + 5]


class Batches(keras.utils.PyDataset):
    """The same by number; it keeps a count of what it was asked for."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked = []

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.asked.append(index)
        return NUMBERS[5 * index : 5 * index + 5], TARGETS[5 * index : 5 * index + 5]


def generators():
    """Fails if a batch goes elsewhere before the first step."""
    model = mlp()
    model.compile("sgd", "mse", metrics=["mae"])

    def work():
        with warnings.catch_warnings():
            # Keras warns of the end of a generator.
            warnings.simplefilter("ignore", UserWarning)
            fitted = model.fit(batches(), validation_data=batches(), validation_steps=2, **QUIET)
            return {
                "history": fitted.history,
                "evaluate": [model.evaluate(batches(), **QUIET) for _ in range(2)],
                "predict": model.predict(batches(), **QUIET),
            }

    return model, work


def by_number():
    """Fails if items are asked for twice, or in another order."""
    model = mlp()
    model.compile("sgd", "mse")

    def work():
        data = Batches()
        options = {"epochs": 2, "shuffle": False, **QUIET}
        histories = [model.fit(d, **options).history for d in (data, Batches(workers=2))]
        return {"history": histories, "asked": data.asked[:5]}

    return model, work


def shuffled():
    """Fails if a shuffle has drawn an order before the first step; the model is built by it."""
    model = keras.Sequential([layers.Dense(6, "tanh"), layers.Dense(2)])
    model.compile("sgd", "mse")

    def work():
        data = tf.data.Dataset.from_tensor_slices((NUMBERS, TARGETS)).shuffle(ROWS, seed=1)
        data = data.batch(BATCH)
        histories = [model.fit(data, epochs=2, **QUIET).history for _ in range(2)]
        return {"history": histories, "evaluate": model.evaluate(data, **QUIET)}

    return model, work


def own_step():
    """Fails if a model whose step calls it in a way of its own is called otherwise to build it."""

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def call(self, pair):
            return self.body(pair[0] + pair[1])

        def train_step(self, data):
            x, y = data
            return super().train_step(((x, x), y))

    model = Twice()
    model.compile("sgd", "mse", metrics=["mae"])
    return model, lambda: fit(model)


def lists():
    """Fails if inputs in a list are taken for targets or weights."""
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], mlp()(layers.Subtract()([a, b])))
    model.compile("sgd", "mse")
    x = [NUMBERS, NUMBERS[::-1]]

    def work():
        data = tf.data.Dataset.from_tensor_slices((tuple(x),)).batch(BATCH)
        return {
            **fit(model, x=x),
            "evaluate": model.evaluate(x, TARGETS, **QUIET),
            "predict": [model.predict(x, **QUIET), model.predict(data, **QUIET)],
            "by batch": model.predict_on_batch([part[:6] for part in x]),
        }

    return model, work


class AddedLoss(layers.Layer):
    """The loss of a model that has no targets."""

    def call(self, pair):
        self.add_loss(keras.ops.mean((pair[0] - pair[1]) ** 2))
        return pair[0]


def without_targets():
    """Fails if the second input of a list is taken for the targets."""
    a, b = keras.Input((4,)), keras.Input((2,))
    model = keras.Model([a, b], AddedLoss()([mlp()(a), b]))
    model.compile("sgd")
    return model, lambda: fit(model, x=[NUMBERS, TARGETS], y=None)


class Sum(keras.Model):
    """A model of two inputs, of which one may be missing and one may be a number."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def call(self, inputs):
        x, other, scale = inputs
        return self.body(x if other is None else x + other) * scale


def none_and_scalar():
    """Fails if None, or a number that belongs to no row, is split with the rows."""
    model = Sum()
    model.compile("sgd", "mse")
    two = tf.constant(2.0, tf.float64)

    def work():
        data = tf.data.Dataset.from_tensor_slices((NUMBERS, TARGETS)).batch(BATCH)
        with_scale = data.map(lambda x, y: ((x, x, two), y))
        history = model.fit(with_scale, **QUIET).history
        logs = model.train_on_batch((NUMBERS[:5], None, np.float64(3)), TARGETS[:5])
        return {"history": history, "logs": logs}

    return model, work


def missing():
    """Fails if an input that is None for all of the data does not reach the model as None."""
    a, b = keras.Input((4,)), keras.Input((4,), optional=True)

    class Either(layers.Layer):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def call(self, x, other=None):
            return self.body(x if other is None else x + other)

    model = keras.Model([a, b], Either()(a, b))
    model.compile("sgd", "mse")

    def work():
        x = [NUMBERS, None]
        return {**fit(model, x=x), "predict": model.predict(x, **QUIET)}

    return model, work


def sparse_rows():
    """Fails if the entries of a sparse tensor are split otherwise than its rows."""
    model = keras.Sequential([keras.Input((4,), sparse=True), layers.Dense(2)])
    model.compile("sgd", "mse")
    x = tf.sparse.from_dense(np.maximum(NUMBERS, 0))

    def work():
        data = tf.data.Dataset.from_tensor_slices((x, TARGETS)).batch(BATCH)
        first = tf.sparse.slice(x, [0, 0], [5, 4])
        return {
            "history": model.fit(data, **QUIET).history,
            "predict": model.predict(data, **QUIET),
            "logs": model.train_on_batch(first, TARGETS[:5]),
        }

    return model, work


class MeanOfWords(keras.Model):
    """Words of a sentence, looked up and averaged."""

    def __init__(self):
        super().__init__()
        self.table = self.add_weight(shape=(12, 3), name="table")
        self.out = layers.Dense(2)

    def call(self, x):
        table = tf.convert_to_tensor(self.table)
        return self.out(
            tf.reduce_mean(tf.ragged.map_flat_values(lambda i: tf.gather(table, i), x), 1)
        )


def ragged_rows():
    """Fails if rows of unlike lengths are split by their entries, or one that is lent is empty."""
    model = MeanOfWords()
    model.compile("sgd", "mse")
    lengths = 1 + np.arange(ROWS) % 5
    x = tf.RaggedTensor.from_tensor(TOKENS, lengths)

    def work():
        data = tf.data.Dataset.from_tensor_slices((x, TARGETS)).batch(BATCH)
        return {
            "history": model.fit(data, **QUIET).history,
            "predict": model.predict(data, **QUIET),
            "logs": model.train_on_batch(x[:5], TARGETS[:5]),
        }

    return model, work


FEATURES = [
    Feature("a generator, for `fit`, `evaluate` and `predict`", parity(generators)),
    Feature("`PyDataset`, with workers and without", parity(by_number)),
    Feature("a shuffled `tf.data.Dataset`", parity(shuffled), ANY_MODEL),
    Feature("a step that calls the model in its own way", parity(own_step), in_stages=False),
    Feature("a list of inputs", parity(lists)),
    Feature("a list of inputs without targets", parity(without_targets)),
    Feature("None and a scalar beside the batch", parity(none_and_scalar)),
    Feature("an input that is None for all rows", parity(missing), in_stages=False),
    Feature("sparse rows", parity(sparse_rows), ANY_MODEL, in_stages=False),
    Feature("ragged rows", parity(ragged_rows), ANY_MODEL, in_stages=False),
]
