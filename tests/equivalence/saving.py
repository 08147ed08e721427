"""Models that are saved under one strategy and go on under another, or under none."""

import contextlib
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from equivalence.columns import PAIR_MODEL, PIPE, Column, column
from equivalence.data import NUMBERS, fit, mlp
from equivalence.features import Feature, compare, one_device, run


def new_model():
    model = mlp()
    model.compile(keras.optimizers.AdamW(0.02, weight_decay=0.1), "mse")
    return model


def goes_on(begin, end, whole=True):
    """Five steps under `begin`, five under `end`, which are scopes or None for one device.

    Fails if a file has a part of the weights or of the optimizer's state, or the order of the
    variables differs.

    Args:
        begin: the strategy that trains first.
        end: the strategy that goes on.
        whole: whether the model is saved, and not its weights only.
    """

    def scope(strategy):
        return contextlib.nullcontext() if strategy is None else strategy.scope()

    def script():
        def work():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "model.keras" if whole else "model.weights.h5")
                with scope(begin):
                    model = new_model()
                first = fit(model)
                model.save(path) if whole else model.save_weights(path)
                with scope(end):
                    if whole:
                        model = keras.models.load_model(path)
                    else:
                        model = new_model()
                        model.optimizer.build(model.trainable_variables)
                        model.load_weights(path)
            second = fit(model)
            state = [np.asarray(v) for v in model.optimizer.variables]
            weights = model.get_weights()
            return {"first": first, "second": second, "optimizer": state, "weights": weights}

        return None, work

    return script


ON_ONE_DEVICE = goes_on(None, None)


def another(of: Column) -> Column:
    """The next strategy of the table."""
    titles = (*PAIR_MODEL, PIPE)
    return column(titles[(titles.index(of.title) + 1) % len(titles)])


def to_one_device(column: Column) -> float:
    return compare(run(goes_on(column.make(), None)), one_device(ON_ONE_DEVICE))


def from_one_device(column: Column) -> float:
    return compare(run(goes_on(None, column.make())), one_device(ON_ONE_DEVICE))


def to_another_mesh(column: Column) -> float:
    script = goes_on(column.make(), another(column).make())
    return compare(run(script), one_device(ON_ONE_DEVICE))


def weights_to_another_mesh(column: Column) -> float:
    script = goes_on(column.make(), another(column).make(), whole=False)
    return compare(run(script), one_device(ON_ONE_DEVICE))


def export():
    """Fails if a SavedModel has a part of the weights, or needs the devices of the mesh."""
    model = new_model()

    def work():
        fit(model)
        with tempfile.TemporaryDirectory() as folder:
            model.export(folder, verbose=False)
            loaded = tf.saved_model.load(folder)
            served = loaded.serve(NUMBERS)
        return {"prediction": model.predict(NUMBERS, verbose=0), "served": served.numpy()}

    return model, work


def exported(column: Column) -> float:
    results = run(export, column.make())
    np.testing.assert_allclose(results["served"], results["prediction"], rtol=0, atol=1e-12)
    return compare(results, one_device(export))


FEATURES = [
    Feature("saved, goes on on one device", to_one_device),
    Feature("saved on one device, goes on", from_one_device),
    Feature("saved, goes on on the strategy to the right", to_another_mesh),
    Feature("`save_weights`, goes on on the strategy to the right", weights_to_another_mesh),
    Feature("`export`, loaded with `tf.saved_model.load`", exported),
]
