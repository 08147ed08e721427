"""What is compiled by XLA, and what is computed again in the backward pass.

Stock Keras fails at `RematScope` in a graph on one device too, so the reference is the same model
without it: what is computed again changes no number.
"""

import keras
from keras import layers

from equivalence.columns import ANY_MODEL, PAIR_MODEL, PIPE
from equivalence.data import LABELS, NUMBERS, PADDED, TARGETS, fit, mlp
from equivalence.features import Feature, parity


def words() -> keras.Model:
    """A mask, attention whose three inputs are one tensor, a sparse gradient, a softmax."""
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(12, 4, mask_zero=True)(inputs)
    x = layers.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True) + x
    x = layers.LayerNormalization()(x)
    x = layers.Dense(4, activation="gelu", activity_regularizer="l2")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(2, activation="softmax")(x))


def of_words(jit=False, scope=None):
    """Fails if a mask, a regularizer or a sparse gradient is lost in a block, if the loss does not
    find the logits behind the softmax, or if one tensor has the gradients of three."""

    def script():
        with keras.RematScope(scope):
            model = words()
        model.compile("adamw", "sparse_categorical_crossentropy", jit_compile=jit)

        def work():
            results = fit(model, 1, PADDED, LABELS)
            return {**results, "prediction": model.predict(PADDED, batch_size=8, verbose=0)}

        return model, work

    return script


def of_numbers(jit=False, **scope):
    """Fails if a block reads or writes another variable than the layer, or gathers it wrongly."""

    def script():
        with keras.RematScope(**(scope or {"mode": None})):
            model = mlp()
        model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=jit)
        return model, lambda: fit(model)

    return script


class Branch(layers.Layer):
    """A residual branch that `keras.remat` wraps; it counts its calls."""

    def __init__(self, again):
        super().__init__()
        self.up, self.down = layers.Dense(6, activation="gelu"), layers.Dense(4)
        self.again = again

    def build(self, shape):
        self.calls = self.add_weight(
            name="calls", dtype="int32", initializer="zeros", trainable=False
        )

    def inner(self, x, scale=1.0):
        self.calls.assign_add(1)
        return self.down(self.up(x)) * scale

    def call(self, x):
        branch = keras.remat(self.inner) if self.again else self.inner
        return x + branch(x, scale=0.5)


def branches(again):
    """Fails if state is written twice, or if variables that a function reads get no gradient."""

    def script():
        model = keras.Sequential([Branch(again), Branch(again), layers.Dense(2)])
        model.compile("adam", "mse")
        return model, lambda: fit(model, 1, NUMBERS, TARGETS)

    return script


def row(title, script, reference, columns=PAIR_MODEL, **options):
    return Feature(title, parity(script, reference), columns, **options)


WORDS, PLAIN, KEPT = of_words(), of_numbers(), branches(False)

FEATURES = [
    row("`jit_compile=True`", of_numbers(jit=True), PLAIN),
    row(
        "`jit_compile=True`, masks and attention",
        of_words(jit=True),
        WORDS,
        ANY_MODEL,
        # XLA compiles for each device: four take three times as long.
        every_change=("data=2", PIPE),
    ),
    row('`RematScope("full")`', of_numbers(mode="full"), PLAIN),
    row('`RematScope("full")`, masks and attention', of_words(scope="full"), WORDS, ANY_MODEL),
    row('`RematScope("activations")`', of_numbers(mode="activations"), PLAIN),
    row(
        '`RematScope("larger_than")`',
        of_numbers(mode="larger_than", output_size_threshold=1),
        PLAIN,
    ),
    row(
        '`RematScope("list_of_layers")`',
        of_numbers(mode="list_of_layers", layer_names=["hidden"]),
        PLAIN,
    ),
    row(
        "`RematScope` and `jit_compile=True`",
        of_numbers(jit=True, mode="full"),
        PLAIN,
        in_stages=False,
    ),
    row("`keras.remat` of a function", branches(True), KEPT, ANY_MODEL),
]
