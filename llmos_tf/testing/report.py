"""What a verification found: plain data, a row for each mesh and each thing that was compared."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was compared on one mesh.

    Args:
        mesh: its axes.
        parallelism: what the mesh stands for.
        feature: "gradients", "weights", "loss", "metrics", "storage", "dropout", or "run" for a run
            that ended in an error.
        difference: the largest absolute difference from one device over all steps; bytes for
            "storage"; None where nothing is subtracted.
        verdict: "agrees", "differs", or "error: ..." with the error.
        step: first step that differs, counted from 1; 0 is the model before the first one.
        variable: first variable, layer or value of that step that differs.
        detail: what was seen there.
        hint: where to look.
    """

    mesh: str
    parallelism: str
    feature: str
    difference: float | None
    verdict: str = "agrees"
    step: int | None = None
    variable: str | None = None
    detail: str | None = None
    hint: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether it is as on one device."""
        return self.verdict == "agrees"

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them; a difference that is no number is a string."""
        values = dataclasses.asdict(self)
        if self.difference is not None and not math.isfinite(self.difference):
            values["difference"] = str(self.difference)
        return values


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a verification found.

    Args:
        rows: in the order of the meshes.
        steps: how many were run.
        dtype: policy in which they were run.
        tolerance: what was allowed: |Δ| <= tolerance · (1 + |value on one device|).
        notes: what a reader of the rows has to know.
    """

    rows: tuple[Row, ...]
    steps: int
    dtype: str
    tolerance: float
    notes: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every row does."""
        return all(row.agrees for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that do not."""
        return tuple(row for row in self.rows if not row.agrees)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON takes it."""
        return {
            "agrees": self.agrees,
            "steps": self.steps,
            "dtype": self.dtype,
            "tolerance": self.tolerance,
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class Mismatch:
    """The first thing in which a run differs from that of one device.

    Args:
        step: counted from 1; 0 is the model before the first one.
        name: of the variable or value.
        difference: its largest absolute difference in that step.
        size: the largest absolute value that it has on one device.
        copies: which ranks' copies of it are not the same, or None.
    """

    step: int
    name: str
    difference: float
    size: float
    copies: str | None = None


class Comparison:
    """Compares values step by step, and keeps the largest difference and the first mismatch.

    Args:
        tolerance: allowed is |Δ| <= tolerance · (1 + |value on one device|), for each element.
    """

    def __init__(self, tolerance: float):
        self._tolerance = tolerance
        self.difference = 0.0
        self.first: Mismatch | None = None

    def add(
        self, step: int, name: str, one: np.ndarray, other: np.ndarray, copies: str | None = None
    ) -> None:
        """Compares one value.

        Args:
            step: counted from 1.
            name: of the variable or value.
            one: on one device.
            other: on the mesh.
            copies: says that `other` is one of several copies that are not the same.

        Raises:
            ValueError: the shapes differ.
        """
        one, other = (np.asarray(value, np.float64) for value in (one, other))
        if one.shape != other.shape:
            raise ValueError(
                f"{name} has the shape {one.shape} on one device and {other.shape} on the mesh. "
                "The function that makes the model has to make the same one at each call."
            )
        delta = np.abs(one - other)
        largest = float(np.max(delta, initial=0.0))
        # np.maximum keeps a NaN.
        self.difference = float(np.maximum(self.difference, largest))
        if self.first is None and not np.all(delta <= self._tolerance * (1 + np.abs(one))):
            size = float(np.max(np.abs(one), initial=0.0))
            self.first = Mismatch(step, name, largest, size, copies)
