"""A feature is a row of the matrix: a Keras script, and how its results are compared.

A script makes and compiles a model as users write it, from Keras alone; a strategy's scope around
that is all that is added. It returns the model and a function that works with it, outside the
scope, whose results are compared with those of the same script on one device: the weights for the
figure in the table, everything else in the test.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from references import build_optimizer

from equivalence.columns import ALWAYS, PAIR_MODEL, PIPE, Column

Script = Callable[[], tuple[keras.Model | None, Callable[[], dict]]]


class Tolerance(NamedTuple):
    """How far weights may differ, and what the document calls it; "" is the usual one."""

    limit: float
    name: str = ""


# Sums in another order in float64, with five to thirty steps of training behind them.
FLOAT64 = Tolerance(1e-9)


@dataclasses.dataclass(frozen=True)
class Feature:
    """A row of the matrix.

    Attributes:
        title: what the document calls it.
        measure: runs it on a column and returns max |Δweight| to the reference; fails where
            another result differs.
        columns: titles of the strategies that it is run on, beside `columns.PIPE`.
        in_stages: whether the model has layers for two stages and none that sees the whole batch.
        tolerance: how far weights may differ.
        note: what a reader of the document has to know.
        every_change: strategies that every change runs, instead of those of `cells_of`.
    """

    title: str
    measure: Callable[[Column], float]
    columns: tuple[str, ...] = PAIR_MODEL
    in_stages: bool = True
    tolerance: Tolerance = FLOAT64
    note: str = ""
    every_change: tuple[str, ...] = ()


class Cell(NamedTuple):
    """A feature on a strategy; `nightly` where not every change runs it."""

    feature: Feature
    column: str
    nightly: bool


def cells_of(features: list[Feature]) -> list[Cell]:
    """Returns all cells; of each feature, two are run for every change: see `columns.ALWAYS`."""
    cells = []
    for number, feature in enumerate(features):
        titles = (*feature.columns, PIPE) if feature.in_stages else feature.columns
        others = [title for title in titles if title != ALWAYS]
        # In strides, so that themes of a few features have the later columns too.
        usual = feature.every_change or {ALWAYS, others[_STRIDE * number % len(others)]}
        cells += [Cell(feature, title, title not in usual) for title in titles]
    return cells


# Shares no divisor with the numbers of other columns, 5 to 7.
_STRIDE = 11


def parity(
    script: Script, reference: Script | None = None, tolerance: Tolerance = FLOAT64
) -> Callable[[Column], float]:
    """Returns a measure: the script on a strategy against a script on one device.

    Args:
        script: runs on the strategy.
        reference: runs on one device, by default the same script.
        tolerance: for the results beside the weights.
    """

    def measure(column: Column) -> float:
        actual = run(script, column.make())
        return compare(actual, one_device(reference or script), tolerance)

    return measure


def run(script: Script, strategy: tf.distribute.Strategy | None = None) -> dict:
    """Returns the results of a script under a strategy's scope, or on one device."""
    keras.backend.clear_session()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model, work = script()
    if strategy is None:
        build_optimizer(model)
    results = work()
    return results if "weights" in results else {**results, "weights": model.get_weights()}


@functools.cache
def one_device(script: Script) -> dict:
    """Returns the results of a script on one device."""
    return run(script)


def compare(actual: dict, expected: dict, tolerance: Tolerance = FLOAT64) -> float:
    """Returns max |Δweight|, after all other results were compared number by number."""
    assert actual.keys() == expected.keys()
    limit = tolerance.limit
    for part in expected.keys() - {"weights"}:
        for one, other in _pairs(actual[part], expected[part]):
            np.testing.assert_allclose(one, other, atol=limit, rtol=limit, err_msg=part)
    return max_difference(actual["weights"], expected["weights"])


def max_difference(actual: Any, expected: Any) -> float:
    """Returns the largest absolute difference of two structures of arrays."""
    return float(
        np.max(
            [np.max(np.abs(one - other), initial=0.0) for one, other in _pairs(actual, expected)]
        )
    )


def _pairs(actual: Any, expected: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    keras.tree.assert_same_structure(actual, expected)
    flat = zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True)
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in flat]
    for one, other in pairs:
        assert one.shape == other.shape
    return pairs
