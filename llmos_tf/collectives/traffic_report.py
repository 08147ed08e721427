"""Bytes on the wire, counted from the traced step."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives.annotations import sending
from llmos_tf.collectives.call_graph import Tally, TracedFunctions

# On a model: a `_Noted`.
_ATTRIBUTE = "_llmos_fitted_batch"


class Traffic(list):
    """A list of dicts, one for each axis and kind; `str` of it is a Markdown table."""

    def __str__(self) -> str:
        rows = [
            (row["axis"], row["kind"], f"{row['calls']:,}", f"{row['bytes']:,}") for row in self
        ]
        lines = [("axis", "kind", "calls", "bytes"), ("---", "---", "---:", "---:"), *rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def traffic(
    strategy: tf.distribute.Strategy,
    step: Any,
    *,
    batch: Any = None,
    stage: int | None = None,
    evaluate: bool = False,
) -> Traffic:
    """Counts what a rank sends in a step, along each axis.

    It looks at the traced step and not at the devices: at the collectives that are called, as often
    as they are called. Of S bytes, the whole tensor, each of N ranks sends

        all_reduce                                          2(N-1)/N · S
        all_gather, reduce_scatter, all_to_all               (N-1)/N · S
        permute (all ranks of a group), send (to a stage)              S

    which is what a ring sends. Padding is sent, so it is counted.

    - A collective over several axes has a row of its own, as "data+fsdp".
    - What is smaller than 1 KiB (losses, metrics, norms, counts) is together in a row of kind
      "scalars" for each axis. Weights that are gathered or scattered, and sums of gradients, are
      not among them, however small.
    - Loops count by their turns, conditions by the branch that sends more. Loops around
      `strategy.run`, such as `steps_per_execution`, count one turn: a step.
    - Rows that travel to experts count as if each pair of ranks exchanged as many. Routing that is
      less even sends more, by as much as the fullest pair is fuller.
    - In a pipeline stages send different amounts: the rows are those of the stage that sends most,
      or of `stage`.
    - A step that takes any number of rows counts with those of `batch`, else of a whole batch of
      the last `fit`.

    Args:
        strategy: a mesh strategy.
        step: a `tf.function` that calls ``strategy.run``, such as `training.make_train_step` makes,
            or a compiled `keras.Model`, of which it is the step of `fit`.
        batch: a global batch as the step takes it, ``(x, y)`` or ``(x, y, sample_weight)``, arrays
            or `tf.TensorSpec`s: the step is traced for its shapes, and nothing is run. None takes
            the step as it was traced first. In a cluster all processes give one, or none does.
        stage: of a pipeline.
        evaluate: of a model, whether the step of `evaluate` is meant.

    Returns:
        A list with a dict for each axis and kind: `axis`, `kind`, `calls` and `bytes`, which one
        rank sends in a step, rounded to a whole number. Printed it is a table.

    Raises:
        ValueError: a step that was not traced yet, or is not one of this strategy; a size that
            depends on a number of rows that is not known; a stage that is not there; a loop whose
            turns are not known.

    Example:
        >>> step = make_train_step(model, optimizer, TokenCrossEntropy())
        >>> print(collectives.traffic(strategy, step, batch=(x, y)))

    Reference:
        Thakur et al., Optimization of collective communication operations in MPICH (2005).
    """  # noqa: DOC502
    mesh = getattr(strategy.extended, "mesh", None)
    if mesh is None:
        raise ValueError(f"traffic counts the steps of a mesh strategy. Received: {strategy!r}.")
    if stage is not None and stage not in range(mesh.axis_size("pipe")):
        raise ValueError(
            f"The mesh {mesh} has the stages 0 to {mesh.axis_size('pipe') - 1}. "
            f"Received: stage={stage!r}."
        )
    tallies = stage_tallies(strategy, step, batch, evaluate)
    if stage is None:
        rows = [_rows(tally) for tally in tallies.values()]
        return max(rows, key=lambda found: sum(row["bytes"] for row in found))
    if stage not in tallies:
        raise ValueError(
            f"This process has the stages {sorted(tallies)}. Received: stage={stage}. Ask a "
            "process that has a rank of it."
        )
    return _rows(tallies[stage])


def note_batch(model: keras.Model, specs: Any) -> None:
    """Notes on a model what a whole batch of its `fit` is like.

    Args:
        model: the model.
        specs: nested `tf.TensorSpec`s of static shapes, or None where it is not known.
    """
    setattr(model, _ATTRIBUTE, _Noted(specs))


def noted_batch(model: keras.Model) -> Any:
    """Returns what was noted of a whole batch of a model's `fit`.

    Args:
        model: the model.

    Returns:
        Nested `tf.TensorSpec`s, or None.
    """
    return getattr(model, _ATTRIBUTE, _Noted(None)).specs


def stage_tallies(
    strategy: tf.distribute.Strategy, step: Any, batch: Any = None, evaluate: bool = False
) -> dict[int, Tally]:
    """Returns what a rank of each stage sends, collective by collective.

    Args:
        strategy: as of `traffic`.
        step: as of `traffic`.
        batch: as of `traffic`.
        evaluate: as of `traffic`.

    Returns:
        By stage, of those that this process has.

    Raises:
        ValueError: as by `traffic`.
    """
    tallies = _tallies(strategy, _traced(strategy, step, batch, evaluate))
    if batch is None and _unsized(tallies) is not None:
        noted = noted_batch(step)
        if noted is not None:
            tallies = _tallies(strategy, _traced(strategy, step, noted, evaluate))
    unsized = _unsized(tallies)
    if unsized is not None:
        raise ValueError(
            f"How much the {unsized.kind} along {unsized.axes} of a {unsized.dtype} tensor of "
            f"shape {unsized.shape} sends depends on the batch: the step was traced for any number "
            "of rows. Give a batch=(x, y) of the size that counts."
        )
    return tallies


@dataclass(frozen=True)
class _Noted:
    """What `fit` was given; in a class of its own, as Keras looks into what it knows."""

    specs: Any


def _tallies(strategy: Any, concrete: Any) -> dict[int, Tally]:
    """What the programs send, by stage."""
    extended = strategy.extended
    devices = [extended.mesh.devices[rank] for rank in extended.local_ranks]
    tallies = TracedFunctions(concrete).tallies(devices)
    first = extended.collective_keys.first
    if not tallies or any(sent.strategy != first for tally in tallies.values() for sent in tally):
        raise ValueError(
            f"The step runs nothing on the mesh {extended.mesh} of this strategy. Give a "
            "tf.function that calls its strategy.run, or the strategy under whose scope the model "
            "of the step was made."
        )
    ranks = {rank: tallies.get(extended.mesh.devices[rank]) for rank in extended.local_ranks}
    # Ranks of one stage have one program.
    return {
        extended.mesh.coordinate(rank)["pipe"]: tally
        for rank, tally in ranks.items()
        if tally is not None
    }


def _unsized(tallies: Mapping[int, Tally]) -> Any:
    """A collective whose size is not known, or None."""
    everything = (sent for tally in tallies.values() for sent in tally)
    return next((sent for sent in everything if sent.bytes is None), None)


def _traced(strategy: Any, step: Any, batch: Any, evaluate: bool) -> Any:
    """The concrete function of a step."""
    with sending(strategy) as left_out:
        return _with_ops(strategy, step, batch, evaluate, left_out)


def _with_ops(strategy: Any, step: Any, batch: Any, evaluate: bool, left_out: bool) -> Any:
    if isinstance(step, keras.Model):
        if step.distribute_strategy is not strategy:
            raise ValueError(
                f"The model {step.name!r} was made under the scope of another strategy than the "
                f"one that was given, {strategy!r}. Give its own, model.distribute_strategy."
            )
        return _traced_model(strategy, step, batch, evaluate, left_out)
    if not isinstance(step, tf.types.experimental.PolymorphicFunction):
        raise ValueError(
            "traffic looks at a tf.function that calls strategy.run, or at a keras.Model. "
            f"Received: {step!r}."
        )
    if batch is not None:
        arguments = batch if isinstance(batch, tuple | list) else (batch,)
        specs = tf.nest.map_structure(_spec, list(arguments))
        return _internal.untraced(step).get_concrete_function(*specs)
    return _first_trace(step, left_out)


def _traced_model(
    strategy: Any, model: keras.Model, batch: Any, evaluate: bool, left_out: bool
) -> Any:
    name, method = ("test", "evaluate") if evaluate else ("train", "fit")
    if batch is not None:
        run = tf.function(
            lambda data: strategy.run(getattr(model, f"{name}_step"), args=(data,)),
            autograph=False,
        )
        return run.get_concrete_function(tf.nest.map_structure(_spec, batch))
    functions = _step_functions(model, name)
    traced = next((i for i, f in enumerate(functions) if _internal.traced_functions(f)), None)
    if traced is None:
        raise _untraced(f"Call {method} of the model {model.name!r}")
    trace = _internal.traced_functions(functions[traced])[0]
    return _again(_new_step_functions(model, name)[traced], trace) if left_out else trace


def _step_functions(model: keras.Model, name: str) -> list[Any]:
    steps = getattr(model, f"{name}_function")
    return [] if steps is None else _internal.functions_of_keras_step(steps)


def _new_step_functions(model: keras.Model, name: str) -> list[Any]:
    """Functions like those of the model, of which none was traced, nor one inside of them."""
    before = getattr(model, f"{name}_function")
    try:
        getattr(model, f"make_{name}_function")(force=True)
        return _step_functions(model, name)
    finally:
        setattr(model, f"{name}_function", before)


def _first_trace(function: Any, left_out: bool) -> Any:
    traces = _internal.traced_functions(function)
    if not traces:
        raise _untraced("Call it once")
    return _again(_internal.untraced(function), traces[0]) if left_out else traces[0]


def _again(function: Any, trace: Any) -> Any:
    """A trace of `function` for the same arguments."""
    args, kwargs = trace.structured_input_signature
    return function.get_concrete_function(*args, **kwargs)


def _untraced(what: str) -> ValueError:
    return ValueError(
        f"The step was not traced yet, so there is nothing to count. {what} first, or give a "
        "batch=(x, y) for whose shapes it is to be traced."
    )


def _spec(x: Any) -> Any:
    if x is None or isinstance(x, tf.TypeSpec):
        return x
    x = x if isinstance(x, tf.Tensor) else np.asarray(x)
    return tf.TensorSpec(x.shape, x.dtype)


def _rows(tally: Tally) -> Traffic:
    sums: dict[tuple[str, str], tuple[Fraction, Fraction]] = {}
    for sent, times in tally.items():
        key = sent.axes, "scalars" if sent.is_scalars else sent.kind
        calls, wire = sums.get(key, (Fraction(0), Fraction(0)))
        sums[key] = calls + times, wire + times * sent.wire
    return Traffic(
        {"axis": axis, "kind": kind, "calls": round(calls), "bytes": round(wire)}
        for (axis, kind), (calls, wire) in sorted(sums.items())
    )
