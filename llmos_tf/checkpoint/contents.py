"""What a checkpoint stores of a model: its configuration and its variables, by name."""

import json
from dataclasses import dataclass
from typing import Any

import keras

from llmos_tf.checkpoint.names import (
    named_model_variables,
    named_optimizer_variables,
    optimizer_kind,
)


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The variables of a model and of its optimizer.

    Args:
        config: the model's configuration as JSON gives it back, or None where it has none.
        model_variables: by name, in the model's order.
        optimizer: its class, or None where there is none.
        optimizer_variables: by name, in the optimizer's order.
    """

    config: dict[str, Any] | None
    model_variables: dict[str, keras.Variable]
    optimizer: str | None
    optimizer_variables: dict[str, keras.Variable]


def model_contents(model: keras.Model) -> Contents:
    """Returns the configuration and the variables of a model, without an optimizer.

    Args:
        model: a built Keras model.

    Returns:
        The contents; their optimizer is None.

    Raises:
        ValueError: the model has no weights yet.
    """
    if not model.built:
        raise ValueError(
            f"The model {model.name!r} has no weights yet, so there is nothing to save or to "
            "restore. Build it first: give its input shape, or call it on a batch."
        )
    # A Keras model may have an attribute of that name which is something else.
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    return Contents(
        config=json.loads(json.dumps(to_dict())) if callable(to_dict) else None,
        model_variables=named_model_variables(model),
        optimizer=None,
        optimizer_variables={},
    )


def training_contents(
    model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None
) -> Contents:
    """Returns the configuration and the variables of a model and its optimizer.

    An optimizer that has no state yet gets its state, under the model's strategy.

    Args:
        model: a built Keras model.
        optimizer: its optimizer; None takes that of `model.compile`, if there was one.

    Returns:
        The contents.

    Raises:
        ValueError: the model has no weights yet.
    """  # noqa: DOC502
    contents = model_contents(model)
    optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
    if optimizer is None:
        return contents
    if not optimizer.built:
        with model.distribute_strategy.scope(), keras.name_scope(optimizer.name):
            optimizer.build(model.trainable_variables)
    return Contents(
        config=contents.config,
        model_variables=contents.model_variables,
        optimizer=optimizer_kind(optimizer),
        optimizer_variables=named_optimizer_variables(optimizer, contents.model_variables),
    )
