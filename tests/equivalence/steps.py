"""What stock Keras with `tf.distribute` gets wrong in a step."""

import keras
import numpy as np

from equivalence.columns import ANY_MODEL, PAIR_MODEL
from equivalence.data import BATCH, NUMBERS, TARGETS, fit, mlp
from equivalence.features import Feature, parity


def gradient_accumulation():
    """Fails if the sum of two steps is of one rank's gradients, or is divided twice."""
    model = mlp()
    model.compile(keras.optimizers.Adam(0.05, gradient_accumulation_steps=2), "mse")
    return model, lambda: fit(model, epochs=2)


def averages_with_overwriting():
    """Fails if the average is of a rank's part only, or is written in another step."""
    model = mlp()
    average = {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 2}
    model.compile(keras.optimizers.Adam(0.05, **average), "mse")
    return model, lambda: fit(model, epochs=2)


def averages_at_the_end():
    """Fails if the end of fit does not write the averages, or a part of them."""
    model = mlp()
    model.compile(keras.optimizers.SGD(0.3, use_ema=True, ema_momentum=0.8), "mse")
    return model, lambda: fit(model)


def everything_at_once():
    """Fails if clipping, accumulation, averages and decay come in another order."""
    model = mlp()
    optimizer = keras.optimizers.AdamW(
        0.01,
        weight_decay=0.2,
        global_clipnorm=0.1,
        gradient_accumulation_steps=2,
        use_ema=True,
        ema_momentum=0.9,
        ema_overwrite_frequency=4,
    )
    model.compile(optimizer, "mse")
    return model, lambda: fit(model, epochs=2)


def clipped_by(**limit):
    """Fails if what is clipped is a rank's gradient before the sum, or a part's norm."""

    def script():
        model = mlp()
        model.compile(keras.optimizers.SGD(0.5, momentum=0.9, **limit), "mse")
        return model, lambda: fit(model)

    return script


def uneven_batches():
    """Fails if rows of a last batch of three weigh as those of a full one, or if a row that one of
    four replicas is lent counts; shuffled."""
    model = mlp()
    model.compile("adam", "mse", metrics=["mae"])

    def work():
        results = fit(model, 2, NUMBERS[:27], TARGETS[:27], shuffle=True)
        evaluation = model.evaluate(NUMBERS, TARGETS, batch_size=13, verbose=0, return_dict=True)
        prediction = model.predict(NUMBERS, batch_size=16, verbose=0)
        return {**results, "evaluation": evaluation, "prediction": prediction}

    return model, work


def tiny_batches():
    """Fails if a device without rows counts, in each of five steps of two rows or one."""
    model = mlp()
    model.compile("adam", "mse", metrics=["mae"])

    def work():
        results = fit(model, 1, NUMBERS[:9], TARGETS[:9], batch_size=2)
        prediction = model.predict(NUMBERS[:3], batch_size=2, verbose=0)
        return {**results, "prediction": prediction}

    return model, work


def steps_per_execution():
    """Fails if a loop of three steps on five (three, then two) loses or repeats one."""
    model = mlp()
    model.compile("adam", "mse", metrics=["mae"], steps_per_execution=3)

    def work():
        results = fit(model, 2, validation_data=(NUMBERS[:17], TARGETS[:17]))
        return {**results, "prediction": model.predict(NUMBERS, batch_size=BATCH, verbose=0)}

    return model, work


def compile_outside_the_scope():
    """Fails if state that was made outside of the scope is one device's, or another one."""
    model = mlp()

    def work():
        rate = keras.optimizers.schedules.CosineDecay(0.1, 10)
        model.compile(keras.optimizers.Adam(rate), "mse", metrics=["mae"])
        return fit(model)

    return model, work


def run_eagerly():
    """Fails if eager steps wait for devices that were not called yet, or reduce otherwise."""
    model = mlp()
    model.compile("adam", "mse", run_eagerly=True)
    return model, lambda: fit(model)


def loss_scale(inner):
    """One row overflows in each of eight batches: that at place 0, then 1, and so on.

    So on any mesh each rank in turn is the only one with a gradient that is not finite. It is not
    for one feature only, so that of ranks that store parts of the sum only some see it. Fails if
    the verdict is not that of all ranks, the scale is not halved, or a step goes into the weights.
    """

    def script():
        model = mlp(activation=None)
        # Doubles after two finite steps in a row. Even after eight halvings the gradient of a
        # feature of 1e300 is 1e300 · 2**52, no float64.
        scaled = keras.optimizers.LossScaleOptimizer(inner(), 2.0**60, dynamic_growth_steps=2)
        model.compile(scaled, "mae")
        x = np.tile(NUMBERS[:BATCH], (12, 1))
        # In all other rows the first feature is zero, and so are its weights, for ever.
        x[:, 0] = 0
        for place in range(BATCH):
            x[(place + 2) * BATCH + place, 0] = 1e300
        y = np.tile(TARGETS[:BATCH], (12, 1))
        seen = []
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append(
                (float(scaled.dynamic_scale), model.get_weights())
            )
        )

        def work():
            kernel = model.layers[0].kernel
            kernel.assign(kernel.numpy() * np.array([[0.0], [1.0], [1.0], [1.0]]))
            results = fit(model, 1, x, y, callbacks=[note])
            powers = [np.log2(scale) for scale, _ in seen]
            assert powers == [60, 61, *range(60, 52, -1), 53, 54]
            for place in range(2, 2 + BATCH):
                before, after = seen[place - 1][1], seen[place][1]
                assert all((a == b).all() for a, b in zip(before, after, strict=True))
            return {**results, "batches": seen}

        return model, work

    return script


def row(title, script, columns=PAIR_MODEL):
    return Feature(title, parity(script), columns)


TINY = ("data=2", "data=4", "data=8", *ANY_MODEL[2:])

FEATURES = [
    row("gradient accumulation", gradient_accumulation),
    row("averages of weights, overwriting every 2 steps", averages_with_overwriting),
    row("averages of weights, at the end of `fit`", averages_at_the_end),
    row("`clipnorm`", clipped_by(clipnorm=0.05)),
    row("`global_clipnorm`", clipped_by(global_clipnorm=0.05)),
    row("`clipvalue`", clipped_by(clipvalue=0.02)),
    row("clipping, accumulation, averages and decay together", everything_at_once),
    row("loss scale around SGD, inf on each rank in turn", loss_scale(keras.optimizers.SGD)),
    row("loss scale around Adam, inf on each rank in turn", loss_scale(keras.optimizers.Adam)),
    row("uneven last batch; `evaluate` and `predict` uneven", uneven_batches),
    row("batches smaller than the mesh", tiny_batches, TINY),
    row("`steps_per_execution=3` on 5 steps", steps_per_execution),
    row("`compile` outside the scope", compile_outside_the_scope),
    row("`run_eagerly`", run_eagerly),
]
