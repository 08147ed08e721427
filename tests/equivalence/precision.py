"""Mixed precision: weights in float32, products and gradients in 16 bits."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from equivalence.columns import ANY_MODEL
from equivalence.data import NUMBERS, TARGETS, fit
from equivalence.features import Feature, Tolerance, parity

RATE, STEPS = 0.02, 5
INPUTS = np.tanh(NUMBERS).astype("float32")
OUTPUTS = np.tanh(TARGETS).astype("float32")


def rounding(bits: int, name: str) -> Tolerance:
    """How far rounding may drive two trainings apart, for `bits` bits of mantissa after the point.

    The model is p = x·w + b, of 4 inputs |x| ≤ 1; the loss is the mean over n ≤ 8 rows and 2
    outputs of (p − y)², so its gradient for w is the mean over the rows of x·(p − y). Let
    A = 4·0.3 + 0.1 + 0.8 = 2.1 bound |x|·|w| + |b| + |y|; the script checks |w| ≤ 0.3, |b| ≤ 0.1.

    A rounding changes a number by u = 2**−(bits + 1) of itself at most. Up to p there are 4 of
    them in the product, should it add in 16 bits, one for the bias, one as w is cast; one for
    (p − y) as its gradient is cast; 8 as the gradient sums the rows. Each changes the gradient by
    u·A at most: 15·u·A in all, for either training, 30·u·A between them, in each of 5 steps of the
    rate 0.02. A difference of weights changes the next gradient by 5 times itself at most (mean of
    Σ|x|² and 1 for the bias), so each step enlarges those before by 1 + 0.02·5.

    That the loss is scaled by a power of two changes no rounding as long as nothing overflows,
    which the script checks. Roundings of float32 are 2**−13 of these at most.

    Args:
        bits: 10 for float16, 7 for bfloat16.
        name: for the document.
    """
    unit = 2.0 ** -(bits + 1)
    growth = sum((1 + RATE * 5) ** step for step in range(STEPS))
    return Tolerance(RATE * growth * 30 * unit * 2.1, name)


def trained_with(policy):
    """Fails if a rank's gradient is scaled, summed or checked other than one device's: stock Keras
    has weights of NaN after an epoch of float16."""

    def script():
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)
        small = keras.initializers.RandomUniform(-0.2, 0.2)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(2, kernel_initializer=small)])
        model.compile(keras.optimizers.SGD(RATE), "mse")

        def work():
            fit(model, 1, INPUTS, OUTPUTS)
            kernel, bias = model.get_weights()
            assert kernel.dtype == "float32"
            assert np.abs(kernel).max() <= 0.3
            assert np.abs(bias).max() <= 0.1
            # Nothing has overflowed where the loss is scaled.
            scale = float(getattr(model.optimizer, "dynamic_scale", 2.0**15))
            return {"scale": scale == 2.0**15, "steps": int(model.optimizer.iterations)}

        return model, work

    return script


def in_float8():
    """Fails if the scales of float8 are trained, or found by the rows of one rank."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential(
        [layers.Dense(6, "tanh", dtype="float8_from_float32"), layers.Dense(2)]
    )
    optimizer = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer), "mse")

    def work():
        history = fit(model, 2, INPUTS, OUTPUTS, batch_size=16)
        # Scales are thousands: by the largest number of each variable.
        weights = [w / max(np.abs(w).max(), 1.0) for w in model.get_weights()]
        return {**history, "weights": weights}

    return model, work


# A float8 layer casts its bias to bfloat16, so that each rank rounds its part of a gradient,
# of at most 1, to 8 bits: in each of four updates RATE · 2**-8.
FLOAT8 = Tolerance(4 * RATE * 2**-8, "rounding of bfloat16")


class Normalized(layers.Layer):
    """Divides by the largest input so far, which it keeps as float8 layers keep their scales."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 6))
        self.largest = self.add_weight(shape=(3,), initializer="ones", overwrite_with_gradient=True)

    def call(self, x):
        @tf.custom_gradient
        def scaled(x, largest):
            after = tf.maximum(0.9 * largest, tf.reduce_max(tf.abs(x)))
            return x / largest[0], lambda dy: (dy / largest[0], after)

        return keras.ops.matmul(scaled(x, tf.convert_to_tensor(self.largest)), self.kernel)


def overwritten():
    """Fails as above; exact, as in float64."""
    model = keras.Sequential([keras.Input((4,)), Normalized(), layers.Dense(2, name="out")])
    model.compile(keras.optimizers.Adam(RATE), "mse")
    return model, lambda: fit(model, 2)


FEATURES = [
    Feature(
        "float8, gradients accumulated",
        parity(in_float8, tolerance=FLOAT8),
        ANY_MODEL,
        tolerance=FLOAT8,
    ),
    Feature("variables that their gradients overwrite", parity(overwritten), ANY_MODEL),
    *(
        Feature(
            f"`{policy}`",
            parity(trained_with(policy)),
            ANY_MODEL,
            in_stages=False,
            tolerance=rounding(bits, f"rounding of {policy.removeprefix('mixed_')}"),
        )
        for policy, bits in (("mixed_float16", 10), ("mixed_bfloat16", 7))
    ),
]
