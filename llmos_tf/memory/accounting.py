"""Counts the bytes of a model's variables on each device."""

from collections.abc import Iterable
from typing import Any

import keras
import tensorflow as tf

_NOTHING = {"parameters": 0, "optimizer": 0, "other": 0}


def report(
    model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None
) -> list[dict[str, Any]]:
    """Counts what the variables of a model and its optimizer hold on each device of this process.

    It walks over the parts that exist and adds up their bytes, padding included, so it is what
    ZeRO's formulas (arXiv 1910.02054) predict and not a prediction itself. Gradients, activations
    and communication live within a step only, and are no variables: they are not counted here.

    Args:
        model: a built Keras model, made under any strategy or none.
        optimizer: for a custom loop around a model that is not compiled; None takes that of
            `model.compile`. One without state yet counts as nothing.

    Returns:
        A dict for each device, in rank order: `device`, and the bytes of `parameters` (trainable
        weights), `optimizer` (its state, its copies of weights, accumulated gradients, and what
        compressed gradients leave for the next step) and `other` (statistics of layers,
        states of random generators, metrics).

    Raises:
        ValueError: the model has no weights yet, or is to be a pipeline and its inputs are not
            known, so that its weights have no place yet.

    Example:
        >>> with ZeroStrategy(stage=3).scope():
        ...     model = keras.Sequential([keras.Input([64]), keras.layers.Dense(64)])
        >>> [row["parameters"] for row in report(model)]  # on 4 devices
        [4160, 4160, 4160, 4160]
    """
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet, so there is nothing to count. Build it "
            "first: give its input shape, or call it on a batch."
        )
    place = getattr(model.distribute_strategy.extended, "place", None)
    if place is not None:
        place(model)
    optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
    # A variable's parts are in rank order, and every rank holds a part of every variable.
    rows: dict[str, dict[str, Any]] = {}
    trainable = list(model.trainable_variables)
    state = [] if optimizer is None else list(optimizer.variables)
    known = {id(variable) for variable in (*trainable, *state)}
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    others = [v for v in (*model.variables, *metrics) if id(v) not in known]
    # What compressed gradients leave for the next step belongs to how weights are updated.
    for variable in trainable:
        stored = getattr(variable, "_value", variable)
        state += getattr(stored, "reduction_state", {}).values()
    for kind, variables in (("parameters", trainable), ("optimizer", state), ("other", others)):
        for part in _parts(variables):
            row = rows.setdefault(part.device, {"device": part.device, **_NOTHING})
            row[kind] += part.shape.num_elements() * part.dtype.size
    return list(rows.values())


def _parts(variables: Iterable[keras.Variable]) -> Iterable[tf.Variable]:
    """Every `tf.Variable` that holds a part of one of `variables`, once."""
    for variable in {id(v): v for v in variables}.values():
        inner = getattr(variable, "_value", variable)
        yield from inner.values if isinstance(inner, tf.distribute.DistributedValues) else [inner]
