"""Callbacks, schedules, and layers that are frozen and thawed."""

import tempfile
from pathlib import Path

import keras
import numpy as np

from equivalence.data import BATCH, NUMBERS, TARGETS, fit, mlp
from equivalence.features import Feature, parity

VALIDATION = (NUMBERS[:11], TARGETS[:11])


def model_checkpoint():
    """Fails if the best epoch's file has a part of the weights, or another epoch is the best."""
    model = mlp()
    model.compile(keras.optimizers.SGD(1.5), "mse")

    def work():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "best.keras")
            save = keras.callbacks.ModelCheckpoint(path, monitor="val_loss", save_best_only=True)
            results = fit(model, 3, validation_data=VALIDATION, callbacks=[save])
            loaded = keras.models.load_model(path)
        state = [np.asarray(v) for v in loaded.optimizer.variables]
        return {**results, "optimizer": state, "weights": loaded.get_weights()}

    return model, work


def early_stopping():
    """Fails if another epoch stops the training, or its weights are not brought back whole."""
    model = mlp()
    model.compile(keras.optimizers.SGD(2.5), "mse")
    stop = keras.callbacks.EarlyStopping("val_loss", restore_best_weights=True, min_delta=0.3)
    return model, lambda: fit(model, 6, validation_data=VALIDATION, callbacks=[stop])


def reduced_rate():
    """Fails if a rate that a callback sets does not reach all ranks."""
    model = mlp()
    model.compile(keras.optimizers.SGD(0.5), "mse")
    reduce = keras.callbacks.ReduceLROnPlateau("loss", factor=0.3, patience=0, min_delta=1.0)
    return model, lambda: fit(model, 3, callbacks=[reduce])


class Interruption(keras.callbacks.Callback):
    """Stops fit in the middle of an epoch, as a machine that goes down."""

    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 8:
            raise InterruptedError


def backup_and_restore(interrupt):
    """Fails if weights or the optimizer's state come back otherwise than they were saved."""

    def script():
        model, another = mlp(), mlp()
        for one in (model, another):
            one.compile("adam", "mse")

        def work():
            if not interrupt:
                fit(model, 3)
                return {"weights": model.get_weights()}
            with tempfile.TemporaryDirectory() as folder:
                backup = str(Path(folder, "backup"))
                try:
                    restore = keras.callbacks.BackupAndRestore(backup)
                    fit(model, 3, callbacks=[restore, Interruption()])
                except InterruptedError:
                    fit(another, 3, callbacks=[keras.callbacks.BackupAndRestore(backup)])
            return {"weights": another.get_weights()}

        return model, work

    return script


def tensorboard():
    """Fails if summaries are written in the replicas' program, or of a part of the weights."""
    model = mlp()
    model.compile("adam", "mse")

    def work():
        with tempfile.TemporaryDirectory() as folder:
            board = keras.callbacks.TensorBoard(folder, histogram_freq=1, update_freq="batch")
            results = fit(model, 2, validation_data=VALIDATION, callbacks=[board])
            assert list(Path(folder, "train").iterdir())
        return results

    return model, work


def weights_read_in_a_callback():
    """Fails if weights that are read, or set, between batches are a rank's part of them."""
    model = mlp()
    model.compile("adam", "mse")
    seen = []

    def look(batch, logs):
        seen.append([*model.get_weights(), *map(np.asarray, model.optimizer.variables)])
        model.layers[0].kernel.assign(0.9 * model.layers[0].kernel)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=look)

    def work():
        return {**fit(model, callbacks=[callback]), "batches": seen}

    return model, work


def swapped_averages():
    """Fails if averages and weights change places otherwise than whole."""
    model = mlp()
    model.compile(keras.optimizers.SGD(0.3, use_ema=True, ema_momentum=0.8), "mse")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    return model, lambda: fit(model, 2, validation_data=VALIDATION, callbacks=[swap])


def schedules():
    """Fails if the count of steps, of which the rate is a function, counts ranks."""
    model = mlp()
    rate = keras.optimizers.schedules.ExponentialDecay(0.3, 2, 0.5, staircase=True)
    model.compile(keras.optimizers.Adam(rate), "mse")
    change = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 / (1 + epoch))

    def work():
        first = fit(model, 1)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return {"first": first, "second": fit(model, 2, callbacks=[change])}

    return model, work


def frozen_and_thawed():
    """Fails if a layer that is frozen gets a gradient, or one that is thawed gets no state."""
    model = mlp()
    model.layers[0].trainable = False
    model.compile("adam", "mse")

    def work():
        first = fit(model)
        model.layers[0].trainable = True
        model.layers[1].trainable = False
        model.compile("adam", "mse")
        second = fit(model)
        model.layers[1].trainable = True
        model.compile("adam", "mse")
        return {"first": first, "second": second, "third": fit(model)}

    return model, work


def evaluated_and_predicted():
    """Fails if rows of the last batch are lost, doubled, or weigh more than others."""
    model = mlp()
    model.compile("adam", "mse", metrics=["mae"])

    def work():
        results = fit(model, validation_split=0.3)
        rows = [
            model.evaluate(NUMBERS[:count], TARGETS[:count], batch_size=BATCH, verbose=0)
            for count in (3, 25, 33)
        ]
        predictions = [model.predict(NUMBERS[:n], batch_size=BATCH, verbose=0) for n in (1, 30)]
        return {**results, "evaluation": rows, "prediction": predictions}

    return model, work


FEATURES = [
    Feature("`ModelCheckpoint`, best only", parity(model_checkpoint)),
    Feature("`EarlyStopping`, best weights", parity(early_stopping)),
    Feature("`ReduceLROnPlateau`", parity(reduced_rate)),
    Feature(
        "`BackupAndRestore` after an interruption",
        parity(backup_and_restore(True), backup_and_restore(False)),
    ),
    Feature("`TensorBoard` with histograms", parity(tensorboard)),
    Feature("`LambdaCallback` that reads and sets weights", parity(weights_read_in_a_callback)),
    Feature("`SwapEMAWeights`", parity(swapped_averages)),
    Feature("learning rates: schedule, then `LearningRateScheduler`", parity(schedules)),
    Feature("layers frozen and thawed between fits", parity(frozen_and_thawed)),
    Feature("`evaluate` and `predict`, uneven", parity(evaluated_and_predicted)),
]
