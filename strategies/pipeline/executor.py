"""Runs a step's parts on one stage, in the order of a schedule."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.collectives import with_length
from llmos_tf.graph_cuts import Cut
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.point_to_point import Edge
from llmos_tf.program import ReplicaProgram
from llmos_tf.sharding import SeedVariable
from llmos_tf.strategies.pipeline.parts import Message, Part
from llmos_tf.strategies.pipeline.step_trace import StepTrace
from llmos_tf.strategies.schedules import Op, Schedule

# Primes of 31 bits, so that seeds of neighbouring microbatches share no pattern.
_SEED_STEP = 1_190_494_759

Values = dict[Any, tf.Tensor]


class StageRun:
    """A step on one stage.

    Args:
        program: of the stage.
        step: the step, in parts.
        schedule: the order of work.
        microbatches: the flat data of each.
        rows: number of own rows of each, int32 scalars.
        reads: values of what this stage's parts read, by the placeholder's `ref()`.
        seed: gradient of what is minimized by the loss, or None for the forward pass alone.
    """

    def __init__(
        self,
        program: ReplicaProgram,
        step: StepTrace,
        schedule: Schedule,
        microbatches: Sequence[Sequence[tf.Tensor]],
        rows: Sequence[tf.Tensor],
        reads: Mapping,
        seed: tf.Tensor | None,
    ):
        self._program, self._step, self._schedule = program, step, schedule
        self.parts: dict[int, Part] = {
            chunk: step.parts[schedule.part_of(program.stage, chunk)]
            for chunk in range(schedule.num_chunks)
        }
        self._differentiates = seed is not None
        # What is the same for all microbatches, and what is known of each.
        self._common: Values = {
            step.coordinate.ref(): program.own_coordinate(),
            step.token.ref(): program.token,
            **{inner.ref(): outer for outer, inner in step.trace.graph.captures},
            **reads,
        }
        if seed is not None:
            self._common[step.seed.ref()] = seed
        self.values: list[Values] = [
            {
                step.microbatch.ref(): tf.constant(number),
                step.rows.ref(): own,
                **{x.ref(): y for x, y in zip(step.data, data, strict=True)},
                **self._states(number, reads),
            }
            for number, (data, own) in enumerate(zip(microbatches, rows, strict=True))
        ]
        # Sums of dense gradients, by the placeholder of the read.
        self.sums: Values = {}
        self._sent: list[tf.Tensor] = []

    def _states(self, number: int, reads: Mapping) -> Values:
        """Other random numbers for each microbatch."""
        states = {}
        for part in self.parts.values():
            for read in part.reads:
                if isinstance(read.variable, SeedVariable):
                    state = reads[read.value.ref()]
                    shift = tf.constant([number * _SEED_STEP % 2**32, 0], state.dtype)
                    states[read.value.ref()] = state + shift
        return states

    def run(self) -> None:
        """Does all that the schedule says of this stage; the forward part of it without a seed."""
        self._add_totals()
        # The ops of a stage follow each other: that is what bounds the activations it holds. What
        # comes from elsewhere is asked for one op ahead.
        done: list[tf.Tensor] = []
        before: list[tf.Tensor] = []
        for op in self._schedule.order(self._program.stage):
            if op.kind == "F" or self._differentiates:
                results = self._do(op, before, done)
                if results:
                    before, done = done, results[:1]
        self._program.require(self._sent)

    def _add_totals(self) -> None:
        """Sums what losses are divided by over microbatches and ranks, before the first op."""
        for part in self.parts.values():
            if not part.totals:
                continue
            counts = [part.count({**self._common, **values}) for values in self.values]
            for (_, total), numbers in zip(part.totals, zip(*counts, strict=True), strict=True):
                if total.ref() not in self._common:
                    self._common[total.ref()] = collectives.all_reduce(
                        tf.add_n(list(numbers)), BATCH_AXES
                    )

    def _do(self, op: Op, before: list[tf.Tensor], done: list[tf.Tensor]) -> list[tf.Tensor]:
        """Does one op and returns what it has computed."""
        number = self._schedule.part_of(self._program.stage, op.chunk)
        part, values = self.parts[op.chunk], self.values[op.microbatch]
        if op.kind == "F":
            self._receive(part.inputs, number - 1, number, op.microbatch, before)
            results = self._call(part.forward, values, done)
            self._send(part.outputs, number, number + 1, op.microbatch)
            return results
        if op.kind == "B":
            self._receive(part.gradient_inputs, number + 1, number, op.microbatch, before)
            results = self._call(part.backward, values, done, part)
            self._send(part.gradient_outputs, number, number - 1, op.microbatch)
            return results
        return self._call(part.weights, values, done, part)

    def _call(
        self, cut: Cut, values: Values, done: list[tf.Tensor], part: Part | None = None
    ) -> list[tf.Tensor]:
        known = {**self._common, **values}
        sums = [] if part is None else part.sums
        for before, _ in sums:
            known[before.ref()] = self.sums.get(before.ref())
            if known[before.ref()] is None:
                known[before.ref()] = tf.zeros(before.shape, before.dtype)
        with tf.control_dependencies(done):
            results = cut(known)
        values.update({x.ref(): y for x, y in zip(cut.fetches, results, strict=True)})
        for before, after in sums:
            if after.ref() in values:
                self.sums[before.ref()] = values.pop(after.ref())
        return results

    # --- between stages ---------------------------------------------------------------------------

    def _edge(self, sender: int, receiver: int) -> Edge | None:
        """The way between the stages of two parts; None within one stage."""
        stage_of = self._schedule.stage_of_part
        shift = (stage_of(receiver) - stage_of(sender)) % self._schedule.num_stages
        return Edge(self._program, ("pipe",), shift) if shift else None

    def _send(self, messages: list[Message], sender: int, receiver: int, microbatch: int) -> None:
        edge = self._edge(sender, receiver) if messages else None
        known = {**self._common, **self.values[microbatch]}
        for message in messages:
            x = known[message.sent.ref()]
            if edge is None:
                self.values[microbatch][message.received.ref()] = x
                continue
            key = message.key + microbatch
            if not message.received.shape.is_fully_defined():
                self._sent.append(edge.send(tf.shape(x), key))
                x = tf.reshape(x, [-1])
                key = with_length(key + self._schedule.num_microbatches, tf.size(x))
            self._sent.append(edge.send(x, key))

    def _receive(
        self,
        messages: list[Message],
        sender: int,
        receiver: int,
        microbatch: int,
        before: list[tf.Tensor],
    ) -> None:
        edge = self._edge(sender, receiver) if messages else None
        if edge is None:
            return
        with tf.control_dependencies(before):
            for message in messages:
                x, key = message.received, message.key + microbatch
                if x.shape.is_fully_defined():
                    value = edge.receive(x.dtype, tuple(x.shape), key)
                else:
                    shape = edge.receive(tf.int32, (x.shape.rank,), key)
                    length = tf.reduce_prod(shape)
                    key = with_length(key + self._schedule.num_microbatches, length)
                    value = tf.reshape(edge.receive(x.dtype, length[tf.newaxis], key), shape)
                self.values[microbatch][x.ref()] = tf.ensure_shape(value, x.shape)

    # --- results ----------------------------------------------------------------------------------

    def all_of(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Returns the values of a tensor of the trace, for each microbatch.

        Args:
            x: a result of one of this stage's parts.

        Returns:
            Its values.
        """
        return [{**self._common, **values}[x.ref()] for values in self.values]

    def store_writes(self) -> None:
        """Stores what the step has written into variables.

        Averages that layers keep up are the mean of what they are after each microbatch; a count is
        the same after each.
        """
        for part in self.parts.values():
            for variable, value in part.writes:
                values = self.all_of(value)
                is_average = value.dtype.is_floating and len(values) > 1
                mean = self._mean(values) if is_average else values[-1]
                variable.store(self._program, mean)

    def _mean(self, values: list[tf.Tensor]) -> tf.Tensor:
        rows = [own[self._step.rows.ref()] for own in self.values]
        weights = [tf.cast(r, values[0].dtype) for r in rows]
        total = tf.add_n([w * v for w, v in zip(weights, values, strict=True)])
        count = tf.add_n(weights)
        return tf.where(count > 0, tf.math.divide_no_nan(total, count), values[0])


def split_rows(program: ReplicaProgram, flat: Sequence[tf.Tensor], count: int) -> tuple[list, list]:
    """Cuts this rank's rows into microbatches.

    Args:
        program: of the stage.
        flat: tensors whose first dimension is rows; scalars go to all microbatches as they are.
        count: number of microbatches.

    Returns:
        For each microbatch its tensors, of at least one row, and its number of own rows.

    Raises:
        ValueError: the microbatches do not divide the rows.
    """
    rows = next((x.shape[0] for x in flat if x.shape.rank), None)
    if rows is not None and rows % count:
        raise ValueError(
            f"num_microbatches={count} does not divide the {rows} rows that each replica has of a "
            f"batch. Take a global batch that is a multiple of {count} times the "
            f"{program.mesh.batch_ways} replica(s), or another number of microbatches."
        )
    microbatches, own = [], []
    for number in range(count):
        parts, mine = [], None
        for x in flat:
            if not x.shape.rank:
                parts.append(x)
                continue
            length = x.shape[0] if x.shape[0] is not None else tf.shape(x)[0]
            begin, end = number * length // count, (number + 1) * length // count
            if x.shape[0] is None:
                mine = end - begin
                # One row at least, as the engine gives each rank; it counts nowhere.
                begin = tf.minimum(begin, length - 1)
                end = tf.maximum(end, begin + 1)
            parts.append(x[begin:end])
        if mine is None:
            mine = tf.constant((rows or count) // count)
        if program.rows is not None:
            mine = tf.where(program.rows > 0, mine, 0)
        microbatches.append(parts)
        own.append(mine)
    return microbatches, own
