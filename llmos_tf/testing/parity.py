"""Parity: the weights of a mesh against those of one device."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf


class TrainedWeights(NamedTuple):
    """What training left.

    Attributes:
        weights: full weights of the model, in its order, by path.
        losses: the loss that `fit` reported for each batch's epoch.
        model: the model.
    """

    weights: dict[str, np.ndarray]
    losses: list[float]
    model: keras.Model


def train(
    build: Callable[[], keras.Model],
    batches: Iterable[tuple],
    strategy: tf.distribute.Strategy | None = None,
    seed: int = 0,
) -> TrainedWeights:
    """Makes a compiled model and fits it on batches in order.

    Args:
        build: makes and compiles the model.
        batches: ``(x, y)`` or ``(x, y, sample_weight)`` global batches of numpy arrays.
        strategy: under whose scope the model is made, or None for one device.
        seed: set before the model is made, so that weights begin alike.

    Returns:
        Weights and the loss reported after each batch.

    Example:
        >>> one = train(build, batches)
        >>> four = train(build, batches, DataParallelStrategy())
        >>> assert max_difference(one, four) < 1e-9
    """
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model = build()
    if strategy is None and model.built:
        # Slots that are created while a step is traced add two branches each: 1.7 times the time.
        model.optimizer.build(model.trainable_variables)
    losses: list[Any] = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: losses.append(float(logs["loss"]))
    )
    rows = [np.concatenate(column) for column in zip(*batches, strict=True)]
    size = len(next(iter(batches))[0])
    weight = rows[2] if len(rows) == 3 else None
    model.fit(
        rows[0],
        rows[1],
        sample_weight=weight,
        batch_size=size,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
    )
    weights = {v.path: np.asarray(v.numpy()) for v in model.weights}
    return TrainedWeights(weights, losses, model)


def max_difference(one: TrainedWeights, other: TrainedWeights) -> float:
    """Returns max |Δweight| over all weights.

    Args:
        one: weights of the reference.
        other: weights to compare, of a model of the same structure.

    Returns:
        The largest absolute difference; NaN where either has one.

    Raises:
        ValueError: the models have other weights.
    """
    shapes = [[value.shape for value in run.weights.values()] for run in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The models differ in their weights' shapes: {shapes[0]}, {shapes[1]}.")
    pairs = zip(one.weights.values(), other.weights.values(), strict=True)
    return float(np.max([np.max(np.abs(a - b), initial=0.0) for a, b in pairs]))
