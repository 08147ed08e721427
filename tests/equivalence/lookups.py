"""Tables of which rows are looked up: their gradients have a row for each index.

Keras's adaptive optimizers square each row by itself, so that what one device has as one row must
not be two here, nor the other way round.
"""

import keras
import tensorflow as tf
from keras import layers, ops

from equivalence.columns import ANY_MODEL
from equivalence.data import LABELS, TOKENS, fit
from equivalence.features import Feature, parity


class Words(keras.Model):
    """Tokens and, as in Keras's guide, positions that are the same for all rows of the batch."""

    def __init__(self, step=None):
        super().__init__()
        self.words, self.places = layers.Embedding(12, 4), layers.Embedding(5, 4)
        self.hidden, self.out = layers.Dense(4, activation="tanh"), layers.Dense(2)
        self.step = step

    def call(self, tokens):
        x = self.words(tokens) + self.places(ops.arange(ops.shape(tokens)[-1]))
        return self.out(ops.mean(self.hidden(x), axis=1))

    def train_step(self, data):
        if self.step is None:
            return super().train_step(data)
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            twice = self.compute_loss(x, y, 2 * self(x, training=True))
        self.step(self, tape, loss, twice)
        return {"loss": loss}


def of_words(step=None, **options):
    def script():
        model = Words(step)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adamw", loss, **options)

        def work():
            results = fit(model, 1, TOKENS, LABELS)
            return {**results, "prediction": model.predict(TOKENS, batch_size=8, verbose=0)}

        return model, work

    return script


def halved(model, tape, loss, _):
    """Fails if the rows are taken as the tape made them, whatever became of the gradient."""
    gradients = tape.gradient(loss, model.trainable_variables)
    halves = [0.5 * tf.convert_to_tensor(gradient) for gradient in gradients]
    model.optimizer.apply(halves, model.trainable_variables)


def two_updates(model, tape, loss, twice):
    """Fails if the second update has the rows of the first one too."""
    for value in (loss, twice):
        gradients = tape.gradient(value, model.trainable_variables)
        model.optimizer.apply(gradients, model.trainable_variables)


def one_of_two_reads(model, tape, loss, twice):
    """Fails if the rows of a read that has no part in the loss count."""
    del twice
    gradients = tape.gradient(loss, model.trainable_variables)
    model.optimizer.apply(gradients, model.trainable_variables)


def row(title, script, reference=None):
    return Feature(title, parity(script, reference), ANY_MODEL)


FEATURES = [
    row("positions looked up for all rows at once", of_words()),
    row("the same with `jit_compile=True`", of_words(jit_compile=True), of_words()),
    row("gradients of lookups, halved by hand", of_words(halved)),
    row("two updates in a step, of lookups", of_words(two_updates)),
    row("a lookup that the loss does not use", of_words(one_of_two_reads)),
]
