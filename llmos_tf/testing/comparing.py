"""From a model on a mesh and what one device did to the rows of a report."""

import dataclasses
from typing import Any

import keras
import numpy as np

from llmos_tf.sharding import SeedVariable, ShardedVariable
from llmos_tf.testing import randomness
from llmos_tf.testing.cases import Case
from llmos_tf.testing.hints import Evidence, hint_for
from llmos_tf.testing.report import Comparison, Mismatch, Row
from llmos_tf.testing.runs import Weights, named_variables
from llmos_tf.testing.storage import stored_bytes

_MADE_WHOLE = (
    "It was made with another layout than its path has: look at the layout rules and at what is "
    "made outside the strategy's scope. Weights agree all the same, memory does not."
)
_STREAMS = (
    "A rank's random generator has a state of its own along data and fsdp, and the same one along "
    "tensor."
)
_DRAWS = "It draws more or less often than on one device: a checkpoint would go on otherwise."


def new_row(case: Case, feature: str, difference: float | None) -> Row:
    """Returns a row that agrees.

    Args:
        case: the mesh.
        feature: what is compared.
        difference: the largest one.

    Returns:
        The row.
    """
    return Row(
        mesh=str(case.mesh),
        parallelism=case.parallelism,
        feature=feature,
        difference=difference,
    )


def differing(row: Row, **fields: Any) -> Row:
    """Returns a row with another verdict.

    Args:
        row: as it is.
        **fields: of `Row` to set; the verdict is "differs" unless given.

    Returns:
        A new row.
    """
    return dataclasses.replace(row, **{"verdict": "differs", **fields})


def compared_row(
    case: Case,
    feature: str,
    comparison: Comparison,
    evidence: Evidence,
    cause: Comparison | None = None,
) -> Row:
    """Returns the row of a comparison, with a hint where it differs.

    Args:
        case: the mesh.
        feature: what was compared.
        comparison: with all steps.
        evidence: for the hint.
        cause: a comparison whose mismatch, where it is no later, explains this one.

    Returns:
        The row.
    """
    row = new_row(case, feature, comparison.difference)
    first = comparison.first
    if first is None:
        return row
    known = None if cause is None else cause.first
    explained = known if known is not None and known.step <= first.step else first
    return differing(
        row,
        step=first.step,
        variable=first.name,
        detail=_detail(first),
        hint=hint_for(explained, evidence),
    )


def compare_weights(
    comparison: Comparison, step: int, expected: Weights, model: keras.Model
) -> None:
    """Compares all weights of a model, on each rank, with those of one device.

    Args:
        comparison: gets what is found.
        step: counted from 1; 0 before the first one.
        expected: weights on one device.
        model: the model on the mesh.

    Raises:
        ValueError: the model has other weights.
    """
    variables = dict(named_variables(model))
    if set(variables) != set(expected):
        raise ValueError(
            "The model has other weights than on one device: "
            f"{', '.join(sorted(set(variables) ^ set(expected))[:3])}. The function that makes the "
            "model has to make the same one at each call."
        )
    for path, variable in variables.items():
        inner = variable._value
        copies = _unlike_copies(inner) if isinstance(inner, ShardedVariable) else {}
        comparison.add(step, path, expected[path], variable.numpy(), ", ".join(copies) or None)
        for where, (one, other) in copies.items():
            comparison.add(step, path, one, other, where)


def compare_logs(
    losses: Comparison,
    metrics: Comparison,
    step: int,
    expected: dict[str, float],
    logs: dict[str, float],
) -> None:
    """Compares what a step has reported with what one device has.

    Args:
        losses: gets the loss.
        metrics: gets everything else.
        step: counted from 1.
        expected: on one device.
        logs: on the mesh.

    Raises:
        ValueError: they have other names.
    """
    if set(logs) != set(expected):
        raise ValueError(
            f"A step reports {', '.join(sorted(logs))}; on one device {', '.join(sorted(expected))}"
        )
    for name, value in logs.items():
        (losses if name == "loss" else metrics).add(step, name, expected[name], value)


def storage_row(case: Case, model: keras.Model) -> Row:
    """Returns the row that says whether each device stores what the layouts say.

    Args:
        case: the mesh and its options.
        model: a model that was trained on it.

    Returns:
        The row; its difference is the largest one in bytes of a variable on a device.
    """
    stored = list(stored_bytes(model, case))
    largest = max((abs(s.actual - s.expected) for s in stored), default=0)
    row = new_row(case, "storage", float(largest))
    for s in stored:
        if s.actual != s.expected:
            return differing(
                row,
                variable=s.name,
                detail=f"holds {s.actual:,} bytes on rank {s.rank}; by its layout {s.expected:,}",
                hint=_MADE_WHOLE,
            )
    return row


def dropout_row(
    case: Case,
    model: keras.Model,
    layers: dict[str, keras.layers.Layer],
    drawn: dict[str, randomness.Draws],
    seeds: dict[str, np.ndarray],
) -> Row:
    """Returns the row that says whether random masks differ where they must, and only there.

    Args:
        case: the mesh.
        model: the model on it, after it has drawn.
        layers: its random layers, by path.
        drawn: what each rank drew.
        seeds: states of the generators of one device, after it has drawn.

    Returns:
        The row.
    """
    row = new_row(case, "dropout", None)
    for path, wrong in randomness.wrong_draws(case, drawn, layers):
        return differing(row, variable=path, detail=wrong, hint=_STREAMS)
    for path, seed in randomness.seeds_of(model).items():
        if not np.array_equal(seed, seeds[path]):
            detail = f"is in the random state {seed.tolist()}, on one device {seeds[path].tolist()}"
            return differing(row, variable=path, detail=detail, hint=_DRAWS)
    return row


def _unlike_copies(variable: ShardedVariable) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Copies of a part that are not the same: which ranks hold them, and what they hold."""
    if isinstance(variable, SeedVariable) or variable.waits:
        return {}
    mesh = variable.mesh
    cut = [axis for axis in (*variable.layout.dims, *variable.layout.flat) if axis is not None]
    first: dict[tuple, tuple[int, np.ndarray]] = {}
    unlike = {}
    ranks = variable.distribute_strategy.extended.local_ranks
    for rank, component in zip(ranks, variable.values, strict=True):
        where = mesh.coordinate(rank)
        if not variable.layout.is_on(where["pipe"]):
            continue
        value = np.asarray(component.numpy(), np.float64)
        other, held = first.setdefault(tuple(where[axis] for axis in cut), (rank, value))
        if not np.array_equal(held, value, equal_nan=True):
            unlike[f"rank {other} and rank {rank}"] = (held, value)
    return unlike


def _detail(first: Mismatch) -> str:
    return f"differs by {first.difference:.3g}; its largest value on one device is {first.size:.3g}"
