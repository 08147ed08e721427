"""Runs of a verification: make the model anew, train it step by step, look after each step."""

import contextlib
import os
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf.testing.batches import as_dataset

# Weights by path, in the model's order.
Weights = dict[str, np.ndarray]


@dataclass
class Recorded:
    """What one device did, kept on the host.

    Args:
        weights: by step; 0 is before the first one.
        final: weights after `fit` has ended, which may put averages in the place of weights.
        logs: what each step reported, by step.
        sgd: weights before and after one step of plain gradient descent.
        seeds: states of the random generators after each layer has drawn.
    """

    weights: dict[int, Weights] = field(default_factory=dict)
    final: Weights = field(default_factory=dict)
    logs: dict[int, dict[str, float]] = field(default_factory=dict)
    sgd: list[Weights] = field(default_factory=list)
    seeds: dict[str, np.ndarray] = field(default_factory=dict)


def make_model(
    build: Callable[[], keras.Model],
    first_batch: tuple,
    strategy: tf.distribute.Strategy | None,
    seed: int,
    dtype: str,
) -> keras.Model:
    """Makes the user's model under a strategy's scope, with all its variables.

    Args:
        build: the user's function.
        first_batch: by which a model without input shapes is built.
        strategy: under whose scope it is made, or None for one device.
        seed: set before.
        dtype: policy of layers that have none of their own; it stays set.

    Returns:
        The compiled, built model.

    Raises:
        ValueError: the function raised an error, or what it returned is no model, not compiled, or
            not made in this call.
    """
    keras.backend.clear_session()
    # `clear_session` has forgotten it.
    keras.config.set_dtype_policy(dtype)
    keras.utils.set_random_seed(seed)
    with scope_of(strategy):
        try:
            model = build()
        except Exception as error:
            raise ValueError(f"{_name(build)} raised {describe(error)}") from error
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"{_name(build)} has to return a compiled keras.Model. Received: {model!r}."
        )
    if not model.compiled:
        raise ValueError(
            f"{_name(build)} has to return a compiled model: call model.compile(optimizer, loss) "
            f"in it. Received: the model {model.name!r}, which is not compiled."
        )
    if strategy is not None and model.distribute_strategy is not strategy:
        raise ValueError(
            f"{_name(build)} has to make its model anew at each call, so that it lies on the mesh "
            f"under whose scope it is called. Received: the model {model.name!r}, which was made "
            "before."
        )
    with scope_of(strategy):
        try:
            model._symbolic_build(data_batch=first_batch)
        except Exception as error:
            raise ValueError(
                f"The model of {_name(build)} cannot be built for the first batch. "
                f"{describe(error)}"
            ) from error
    return model


def train_steps(
    model: keras.Model,
    batches: list[tuple],
    on_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Fits a model on batches in order.

    Args:
        model: as `make_model` returns it.
        batches: global batches.
        on_step: called after each step with its number, counted from 1, and the step's own logs; a
            compiled `steps_per_execution` makes several steps one.
    """
    model.fit(as_dataset(batches), shuffle=False, verbose=0, callbacks=[_EachStep(on_step)])


class _EachStep(keras.callbacks.Callback):
    """Reports each step by itself, where `fit` reports means over the epoch so far."""

    def __init__(self, on_step: Callable[[int, dict[str, float]], None]):
        super().__init__()
        self._on_step = on_step

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        values = {name: np.asarray(value, np.float64) for name, value in (logs or {}).items()}
        self._on_step(batch + 1, values)


def weights_of(model: keras.Model) -> Weights:
    """Returns full copies, on the host, of all weights with the non-trainable ones.

    Args:
        model: a built model.

    Returns:
        Values by path; equal paths are numbered.
    """
    values: Weights = {}
    for path, variable in named_variables(model):
        values[path] = np.array(variable.numpy())
    return values


def named_variables(model: keras.Model) -> Iterator[tuple[str, keras.Variable]]:
    """Yields (path, variable) of all weights in the model's order; equal paths are numbered.

    Args:
        model: a built model.

    Yields:
        Pairs.
    """
    seen: dict[str, int] = {}
    for variable in model.weights:
        count = seen[variable.path] = seen.get(variable.path, 0) + 1
        yield variable.path if count == 1 else f"{variable.path} ({count})", variable


def descend(model: keras.Model, batch: tuple) -> list[Weights]:
    """Takes one step of gradient descent of rate 1, in place of the model's own optimizer.

    What it changes is the gradient, which adaptive optimizers divide by its own size: they hide a
    wrong factor.

    Args:
        model: as `make_model` returns it, with dropout off.
        batch: a global batch.

    Returns:
        Weights before and after it.
    """
    with scope_of(model.distribute_strategy):
        model.optimizer = keras.optimizers.SGD(1.0)
        model.optimizer.build(model.trainable_variables)
    before = weights_of(model)
    train_steps(model, [batch], lambda step, logs: None)
    return [before, weights_of(model)]


def describe(error: BaseException) -> str:
    """Returns an error in one line: its kind, its message, and the line of code that raised it.

    Args:
        error: the error.

    Returns:
        Text that ends in a full stop.
    """
    # Keras prints some of it bold.
    message = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
    if len(message) > 500:
        message = f"{message[:250]} ... {message[-250:]}"
    lines = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_users(frame.f_globals.get("__name__", ""), frame.f_code.co_filename)
    ]
    where = f" ({lines[-1][0]}, line {lines[-1][1]})" if lines else ""
    return f"{type(error).__name__}: {message.rstrip('.')}{where}."


def scope_of(strategy: tf.distribute.Strategy | None) -> contextlib.AbstractContextManager:
    """Returns a strategy's scope, or a context that does nothing for None.

    Args:
        strategy: the strategy.

    Returns:
        A context manager.
    """
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def _is_users(module: str, filename: str) -> bool:
    """Whether code is neither of this package, nor of the libraries, nor made by AutoGraph."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    if module.split(".")[0] == "llmos_tf" or not os.path.isfile(filename):
        return False
    return not filename.startswith(tuple(libraries))


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', function)}"
