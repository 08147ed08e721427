"""Verification: a user's model on meshes against the same model on one device.

`Verification` runs it mesh by mesh, for a program that shows what it has so far; `verify` runs it
all. What is compared, and how:

- "gradients": the weights after one step of plain gradient descent of rate 1 on the first batch. An
  adaptive optimizer hides a wrong factor, this shows it.
- "weights": all weights, non-trainable ones too, after each step with the model's own optimizer,
  and once more after `fit` has ended. On each rank: ranks that hold the same part of a weight have
  to hold the same numbers.
- "loss" and "metrics": what each step reports.
- "storage": bytes of each variable on each device against its layout.
- "dropout": random masks, in models that have them. They differ between ranks with other rows, so
  everything else is compared with dropout rates of 0.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf.mesh import Mesh
from llmos_tf.testing import randomness
from llmos_tf.testing.batches import rows_of, take_batches
from llmos_tf.testing.cases import Case, cases_of
from llmos_tf.testing.comparing import (
    compare_logs,
    compare_weights,
    compared_row,
    differing,
    dropout_row,
    new_row,
    storage_row,
)
from llmos_tf.testing.hints import Evidence, gradient_ratio
from llmos_tf.testing.precision import TOLERANCES, precision
from llmos_tf.testing.report import Comparison, Report, Row
from llmos_tf.testing.runs import (
    Recorded,
    descend,
    describe,
    make_model,
    named_variables,
    train_steps,
    weights_of,
)


class Verification:
    """Compares a model on meshes with the same model on one device.

    Args:
        build: makes and compiles the model, anew at each call; called under the strategy's scope,
            after seeding.
        batches: global batches ``(x, y)`` or ``(x, y, sample_weights)``, each nested arrays.
        meshes: on which to run it.
        steps: batches to take at most.
        zero_stage: for the meshes with a `data` axis (1, 2), or for all (3).
        sequence_parallel: for the meshes with a `tensor` axis.
        layout_map: layouts for the `tensor` axis; None takes the model's own.
        num_microbatches: for the meshes with a `pipe` axis; None: as many as stages.
        schedule: for the same.
        num_chunks: for the same.
        context_method: for the meshes with a `context` axis.
        dtype: policy for all runs, a key of `TOLERANCES`.
        tolerance: |Δ| <= tolerance · (1 + |value on one device|) agrees; None takes the dtype's.
        seed: set before each call of `build`.

    Raises:
        ValueError: what cannot be run: an unknown dtype, no batches, no mesh, a mesh that does not
            fit the devices or the model.
    """  # noqa: DOC502

    def __init__(
        self,
        build: Callable[[], keras.Model],
        batches: Iterable[Any],
        meshes: Sequence[Mesh],
        *,
        steps: int = 5,
        zero_stage: int = 0,
        sequence_parallel: bool = False,
        layout_map: Mapping | None = None,
        num_microbatches: int | None = None,
        schedule: str = "1f1b",
        num_chunks: int = 1,
        context_method: str = "ring",
        dtype: str = "float64",
        tolerance: float | None = None,
        seed: int = 0,
    ):
        if dtype not in TOLERANCES:
            raise ValueError(f"dtype is one of {', '.join(TOLERANCES)}. Received: {dtype!r}.")
        if steps < 1:
            raise ValueError(f"At least one step is verified. Received: steps={steps}.")
        if tolerance is not None and not 0 <= tolerance < np.inf:
            raise ValueError(f"A tolerance is a number from 0. Received: {tolerance}.")
        self.dtype = dtype
        self.tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
        self.cases = cases_of(
            meshes,
            zero_stage=zero_stage,
            sequence_parallel=sequence_parallel,
            layout_map=layout_map,
            num_microbatches=num_microbatches,
            schedule=schedule,
            num_chunks=num_chunks,
            context_method=context_method,
        )
        self._build = build
        self._seed = seed
        self._one = Recorded()
        self._switched_off: tuple[str, ...] = ()
        self._still_random: str | None = None
        with precision(dtype):
            self._batches = take_batches(batches, steps)
            for case in self.cases:
                self._check_layouts(case)
            # Made here, so that a function that makes no model is found out before the first step.
            self._models = [self._make(None), self._make(None)]
            if self._models[0] is self._models[1]:
                raise ValueError(
                    "The function that makes the model returned the same one twice. It has to make "
                    "it anew at each call."
                )
        self.steps = len(self._batches)

    def _check_layouts(self, case: Case) -> None:
        """Finds before the first step what is wrong with a mesh, or its layouts."""
        strategy = case.strategy()
        if case.mesh.axis_size("tensor") > 1:
            self._make(strategy)
            strategy.extended.layout_rules.check_all_used()

    def _make(self, strategy: tf.distribute.Strategy | None) -> keras.Model:
        return make_model(self._build, self._batches[0], strategy, self._seed, self.dtype)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the rows has to know, once one device has run."""
        notes = []
        if self._switched_off:
            names = ", ".join(self._switched_off[:3])
            more = len(self._switched_off) - 3
            names += f" and {more} more" if more > 0 else ""
            notes.append(
                f"Dropout draws other masks for other rows by design. Its rate is set to 0 here "
                f"({names}) in all rows but those named dropout, which compare the masks."
            )
        is_split = any(case.mesh.batch_ways > 1 for case in self.cases)
        if is_split and not any(self._uneven(case.mesh) for case in self.cases):
            notes.append(
                "All batches are split evenly. An uneven one, such as the last one of an epoch, "
                "would also show a mean of means."
            )
        return tuple(notes)

    def run_one_device(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Runs the model on one device and keeps what it did, on the host.

        Args:
            on_step: called after each step.

        Raises:
            ValueError: the model fails on one device.
        """
        one = self._one

        def record(step, logs):
            one.weights[step] = weights_of(model)
            one.logs[step] = logs
            on_step()

        with precision(self.dtype):
            model, first = self._models.pop(), self._models.pop()
            try:
                randomness.switch_off(first)
                one.sgd = descend(first, self._batches[0])
                switched_off = randomness.switch_off(model)
                one.weights[0] = weights_of(model)
                seeds = randomness.seeds_of(model)
                train_steps(model, self._batches, record)
                one.final = weights_of(model)
                moved = randomness.moved_layer(seeds, randomness.seeds_of(model))
                if switched_off:
                    randomness.draw(model, switched_off, self._rows())
                one.seeds = randomness.seeds_of(model)
            except Exception as error:
                raise ValueError(f"The model fails on one device: {describe(error)}") from error
        self._switched_off = tuple(switched_off)
        self._still_random = moved

    def run(self, case: Case, on_step: Callable[[], None] = lambda: None) -> list[Row]:
        """Runs the model on a mesh and compares, after `run_one_device`.

        Args:
            case: one of `cases`.
            on_step: called after each step.

        Returns:
            A row for each thing that was compared; one with the error where the run raised one.

        Raises:
            ValueError: the mesh has a `tensor` axis and the model no layouts for it.
        """  # noqa: DOC502
        strategy = case.strategy()
        try:
            with precision(self.dtype):
                return self._compare(case, strategy, on_step)
        except Exception as error:
            # Layouts that are missing are no fault of the run; a model without input shapes has no
            # variables to find it out by before.
            strategy.extended.layout_rules.check_all_used()
            row = new_row(case, "run", None)
            return [differing(row, verdict=f"error: {describe(error)}")]

    def _compare(self, case, strategy, on_step) -> list[Row]:
        one = self._one
        first = self._make(strategy)
        ratio, gradients = self._compare_gradients(first)
        del first
        model = self._make(strategy)
        switched_off = randomness.switch_off(model)
        weights, losses, metrics = (Comparison(self.tolerance) for _ in range(3))
        compare_weights(weights, 0, one.weights[0], model)

        def compare(step, logs):
            compare_weights(weights, step, one.weights[step], model)
            compare_logs(losses, metrics, step, one.logs[step], logs)
            on_step()

        train_steps(model, self._batches, compare)
        compare_weights(weights, self.steps, one.final, model)
        evidence = Evidence(
            case=case,
            dtype=self.dtype,
            model=model,
            still_random=self._still_random,
            uneven=self._uneven(case.mesh),
            gradients_agree=gradients.first is None,
            ratio=ratio,
            losses=losses.first,
        )
        rows = [
            compared_row(case, "gradients", gradients, evidence),
            compared_row(case, "weights", weights, evidence),
        ]
        # A train_step of the user's own may report anything.
        if "loss" in one.logs[self.steps]:
            rows.append(compared_row(case, "loss", losses, evidence, cause=weights))
        if set(one.logs[self.steps]) - {"loss"}:
            rows.append(compared_row(case, "metrics", metrics, evidence, cause=weights))
        rows.append(storage_row(case, model))
        if switched_off:
            drawn = randomness.draw(model, switched_off, self._rows())
            rows.append(dropout_row(case, model, switched_off, drawn, one.seeds))
        return rows

    def _compare_gradients(self, model: keras.Model) -> tuple[float | None, Comparison]:
        one = self._one.sgd
        randomness.switch_off(model)
        other = descend(model, self._batches[0])
        comparison = Comparison(self.tolerance)
        for step, (expected, actual) in enumerate(zip(one, other, strict=True)):
            for path, value in expected.items():
                comparison.add(step, path, value, actual[path])
        trainable = {path for path, v in named_variables(model) if v.trainable}
        return gradient_ratio(one, other, trainable), comparison

    def _rows(self) -> Any:
        """A row for the model to draw masks with."""
        return tf.nest.map_structure(lambda x: x[:1], self._batches[0][0])

    def _uneven(self, mesh: Mesh) -> dict[int, int]:
        """Rows of the batches that a mesh cannot split evenly, by step."""
        rows = {step: rows_of(batch) for step, batch in enumerate(self._batches, start=1)}
        return {step: count for step, count in rows.items() if count % mesh.batch_ways}


def verify(
    build: Callable[[], keras.Model],
    batches: Iterable[Any],
    meshes: Sequence[Mesh],
    **options: Any,
) -> Report:
    """Compares a model on meshes with the same model on one device.

    Args:
        build: makes and compiles the model, anew at each call.
        batches: global batches ``(x, y)`` or ``(x, y, sample_weights)``.
        meshes: on which to run it.
        **options: as for `Verification`.

    Returns:
        What was found.

    Raises:
        ValueError: what cannot be run; see `Verification`.

    Example:
        >>> report = verify(build, batches, [Mesh(data=2), Mesh(fsdp=2)])
        >>> assert report.agrees, report.failures
    """  # noqa: DOC502
    verification = Verification(build, batches, meshes, **options)
    verification.run_one_device()
    rows = [row for case in verification.cases for row in verification.run(case)]
    return report_of(verification, rows)


def report_of(verification: Verification, rows: Sequence[Row]) -> Report:
    """Puts a report together.

    Args:
        verification: that was run.
        rows: of all its cases.

    Returns:
        The report.
    """
    return Report(
        rows=tuple(rows),
        steps=verification.steps,
        dtype=verification.dtype,
        tolerance=verification.tolerance,
        notes=verification.notes,
    )
