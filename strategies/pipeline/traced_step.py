"""Traces a step of a model once, and cuts it into the parts of all stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.graph.outlined_function import NotABlock
from llmos_tf.graph.subgraph import Cut, GraphCuts
from llmos_tf.sharding import SeedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.pipeline.microbatch_trace import ModelTrace, trace_program
from llmos_tf.strategies.pipeline.model_parts import Division, Part, free_ops

# A step on one microbatch: of its data, to the loss, or None, and tensors in any structure.
Step = Callable[[Any], tuple[tf.Tensor | None, Any]]


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """A step in parts, and what its tensors are in the trace.

    Args:
        parts: of the model, in order.
        seeds: states of streams of random numbers to their next ones, on every stage.
        coordinate: of the rank.
        token: that orders its collectives.
        microbatch: its number.
        rows: number of its own rows.
        data: of the microbatch.
        loss: the microbatch's share of the loss, or None.
        seed: gradient of what is minimized by the loss, or None.
        outputs: what the step has returned beside the loss, in its structure.
        trace: what else the step uses and leaves.
        program: in which it was traced; what the step has said of variables is there.
    """

    parts: list[Part]
    seeds: Cut
    coordinate: tf.Tensor
    token: tf.Tensor
    microbatch: tf.Tensor
    rows: tf.Tensor
    data: list[tf.Tensor]
    loss: tf.Tensor | None
    seed: tf.Tensor | None
    outputs: Any
    trace: ModelTrace
    program: ReplicaProgram

    @property
    def kept_outputs(self) -> list[tf.Tensor]:
        """The tensors in the outputs, each once."""
        tensors = [x for x in tf.nest.flatten(self.outputs) if isinstance(x, tf.Tensor)]
        return list({x.ref(): x for x in tensors}.values())


def trace_step(
    program: ReplicaProgram,
    step: Step,
    data: Any,
    begins: Callable[[ModelTrace], Sequence[int]],
    differentiated: bool,
    has_lent_rows: bool,
) -> StepTrace:
    """Traces a step.

    Args:
        program: of the stage that needs it first.
        step: of the data of a microbatch.
        data: a microbatch; only its specs and what is no tensor in it count.
        begins: tells for each part its first unit.
        differentiated: whether the loss is to be differentiated.
        has_lent_rows: whether a microbatch may have no rows of its own.

    Returns:
        The step.

    Raises:
        ValueError: the step does what a part of a pipeline cannot.
    """
    extended = program.strategy.extended
    flat = tf.nest.flatten(data, expand_composites=True)
    is_tensor = [isinstance(x, tf.Tensor) for x in flat]
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in flat if isinstance(x, tf.Tensor)]
    made: dict[str, Any] = {}

    def body(coordinate, token, microbatch, rows, *tensors):
        remaining = iter(tensors)
        values = [next(remaining) if t else x for t, x in zip(is_tensor, flat, strict=True)]
        own = tf.nest.pack_sequence_as(data, values, expand_composites=True)
        trace = ModelTrace(microbatch, extended.options.num_microbatches)
        inner = trace_program(extended, trace, coordinate, token)
        inner.sharded_logits = program.sharded_logits
        inner.rows = rows if has_lent_rows else None
        # The replacements of Keras are those of the program around.
        with inner:
            loss, outputs = step(own)
        known = [coordinate, microbatch, rows, *tensors, *(total for _, total in trace.totals)]
        known += [read.value for read in trace.reads if read.is_seed]
        results = [x for x in tf.nest.flatten(outputs) if isinstance(x, tf.Tensor)]
        results += [x for _, x, _ in trace.loss_metrics] + ([] if loss is None else [loss])
        free = free_ops(trace.graph, known)
        division = Division(inner, trace, begins(trace), results, free)
        seed = None
        if differentiated:
            seed = tf.compat.v1.placeholder(loss.dtype, [])
            with inner:
                division.differentiate(loss, seed)
        made.update(
            coordinate=coordinate,
            token=token,
            microbatch=microbatch,
            rows=rows,
            data=list(tensors),
            loss=loss,
            seed=seed,
            outputs=outputs,
            trace=trace,
            program=inner,
            division=division,
        )

    scalar = tf.TensorSpec([], tf.int32)
    coordinate = tf.TensorSpec([extended.mesh.coordinates().shape[1]], tf.int32)
    try:
        tf.function(body, autograph=False).get_concrete_function(
            coordinate, tf.TensorSpec([], tf.resource), scalar, scalar, *specs
        )
    except NotABlock as reason:
        raise ValueError(
            f"The model cannot be a pipeline, because {reason}. Use a mesh without a pipe axis."
        ) from None
    division, trace = made.pop("division"), made["trace"]
    _check_captures(trace.graph)
    _internal.keep_gradients_with(trace.graph)
    splits = differentiated and extended.schedule.splits_backward
    cuts = GraphCuts(trace.graph)
    states = [value for variable, value in trace.writes if isinstance(variable, SeedVariable)]
    _reserve_edges(program, extended.schedule)
    return StepTrace(
        parts=division.cut(cuts, splits),
        seeds=cuts.cut(cuts.ancestors(states), states),
        **made,
    )


def _check_captures(graph: tf.Graph) -> None:
    """Checks that the trace uses nothing of one stage's program: it is one for all stages."""
    for outer, _ in graph.captures:
        if tf.is_symbolic_tensor(outer):
            raise ValueError(
                f"The model uses the tensor {outer.name}, which was computed outside of its call. "
                "In a pipeline a model computes with what it is called with, and with variables."
            )


def _reserve_edges(program: ReplicaProgram, schedule: Any) -> None:
    """Takes keys for the ways between stages, in all processes in the same order."""
    for part in range(schedule.num_parts - 1):
        shift = schedule.stage_of_part(part + 1) - schedule.stage_of_part(part)
        for way in (shift, -shift):
            if way:
                program.keys.edge_keys(("pipe",), way % schedule.num_stages)
