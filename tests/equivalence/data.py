"""What the scripts train: a few rows of numbers and tokens, and the plainest model.

33 rows in batches of 8 are five steps, and the last one has one row, fewer than there are devices.
"""

import keras
import numpy as np
from keras import layers

ROWS, BATCH = 33, 8

_rng = np.random.default_rng(0)
NUMBERS = _rng.normal(size=(ROWS, 4))
TARGETS = np.tanh(NUMBERS @ _rng.normal(size=(4, 2))) + 0.1 * _rng.normal(size=(ROWS, 2))
TOKENS = _rng.integers(1, 12, (ROWS, 5))
# Sequences of unequal length, for masks.
PADDED = TOKENS * (np.arange(5) < _rng.integers(1, 6, (ROWS, 1)))
LABELS = _rng.integers(0, 2, ROWS)
# Rows of the first half of a batch weigh little, so that a mean of the replicas' means shows.
WEIGHTS = _rng.random(ROWS) * np.where(np.arange(ROWS) % BATCH < BATCH // 2, 0.2, 1.0)


def mlp(activation: str | None = "tanh", **options) -> keras.Model:
    """Two dense layers whose widths a tensor axis of two divides, of the names of `columns.PAIR`.

    Args:
        activation: of the hidden layer.
        **options: further arguments of the hidden layer.
    """
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation=activation, name="hidden", **options),
            layers.Dense(2, name="out"),
        ]
    )


def fit(model: keras.Model, epochs: int = 1, x=NUMBERS, y=TARGETS, **options) -> dict:
    """Fits in the order of the rows and returns what `fit` reports.

    Args:
        model: compiled.
        epochs: of five steps each.
        x: features.
        y: targets.
        **options: further arguments of `fit`.
    """
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **options}
    return {"history": model.fit(x, y, epochs=epochs, **options).history}
