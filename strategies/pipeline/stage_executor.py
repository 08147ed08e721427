"""Runs a step's parts on one stage, in the order of a schedule."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.collectives.annotations import noted_branches
from llmos_tf.graph.subgraph import Cut
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.planning.schedules import Op, Schedule
from llmos_tf.sharding import SeedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.pipeline.microbatches import Microbatches
from llmos_tf.strategies.pipeline.model_parts import Part
from llmos_tf.strategies.pipeline.stage_loop import Queue, repeat
from llmos_tf.strategies.pipeline.traced_step import StepTrace
from llmos_tf.strategies.pipeline.transport import Transport

# A prime of 31 bits, so that seeds of neighbouring microbatches share no pattern.
_SEED_STEP = 1_190_494_759

# Values of tensors of the trace, by `ref()`.
Values = dict[Any, tf.Tensor]


class StageRun:
    """A step on one stage: one loop over the ops of the schedule, beside those that communicate.

    The ops follow each other, as each is a turn of the loop: that is what bounds the activations
    that a stage holds. What a forward pass keeps for its backward pass waits in a queue.

    Args:
        program: of the stage.
        step: the step, in parts.
        schedule: the order of work.
        microbatches: this rank's rows.
        reads: values of what this stage's parts read, by the placeholder's `ref()`.
        seed: gradient of what is minimized by the loss, or None for the forward pass alone.
        name: of this run on its device, unlike that of any other.

    """

    def __init__(
        self,
        program: ReplicaProgram,
        step: StepTrace,
        schedule: Schedule,
        microbatches: Microbatches,
        reads: Mapping,
        seed: tf.Tensor | None,
        name: str,
    ):
        self._program, self._step, self._schedule = program, step, schedule
        self._microbatches, self._name = microbatches, name
        # The parts of this stage, by their number in the model.
        self.parts: dict[int, Part] = {
            number: step.parts[number]
            for number in range(schedule.num_parts)
            if schedule.stage_of_part(number) == program.stage
        }
        # What is the same for all microbatches.
        self._common: Values = {
            step.coordinate.ref(): program.own_coordinate(),
            step.token.ref(): program.token,
            **{inner.ref(): outer for outer, inner in step.trace.graph.captures},
            **reads,
        }
        if seed is not None:
            self._common[step.seed.ref()] = seed
        kinds = "FBW" if seed is not None else "F"
        self._order = [op for op in schedule.order(program.stage) if op.kind in kinds]
        _check_in_turn(self._order)
        self._transport = Transport(program, schedule, step, name, seed is not None)
        # Sums over the microbatches: of gradients by the placeholder of the sum before, of what
        # the step results in and writes by itself.
        self.sums: Values = {}

    def run(self) -> None:
        """Does all that the schedule says of this stage; the forward part of it without a seed."""
        # After whatever has communicated before. Read once, before the first loop: the loop that
        # computes uses the token, so that what reads it later waits for that loop.
        cleared = [op for queue in self._queues() for op in queue.clear()]
        with tf.control_dependencies(cleared):
            self._program.require([])
        zero = self._program.zero_after_required()
        self._add_totals(zero)
        carried = [*(before for part in self.parts.values() for before, _ in part.sums)]
        carried += [x for number in self.parts for x in self._summed(number)]
        keys = [x.ref() for x in carried]
        tasks = [
            (op.kind, self._schedule.part_of(self._program.stage, op.chunk)) for op in self._order
        ]
        branches = list(dict.fromkeys(tasks))
        branch_of = tf.constant([branches.index(task) for task in tasks])
        number_of = tf.constant([op.microbatch for op in self._order])

        def turn(tick, *values):
            state = dict(zip(keys, values, strict=True))

            def does(kind, part):
                return lambda: self._do(kind, part, number_of[tick], dict(state))

            with noted_branches([tasks.count(branch) for branch in branches]):
                return tf.switch_case(branch_of[tick], [does(*branch) for branch in branches])

        zeros = [tf.zeros(x.shape, x.dtype) for x in carried]
        turns, results = repeat(zero, len(self._order), turn, zeros)
        self.sums = dict(zip(keys, results, strict=True))
        self._program.require([turns, *self._transport.run(zero)])

    def all_of(self, x: tf.Tensor) -> list[tf.Tensor]:
        """Returns the values of what was kept of each microbatch, once.

        Args:
            x: an output of the step, or a component of a sparse gradient.

        Returns:
            Its values, in order.
        """
        values: list[tf.Tensor] = []
        for _ in range(self._microbatches.count):
            with tf.control_dependencies([self._program.required, *values[-1:]]):
                values += self._results(x).take()
        return values

    # --- one microbatch ---------------------------------------------------------------------------

    def _do(self, kind: str, number: int, microbatch: tf.Tensor, state: Values) -> list[tf.Tensor]:
        """Does one op and returns the sums after it."""
        part = self.parts[number]
        known = {**self._known(microbatch), **state}
        if kind == "F":
            done = self._forward(number, part, known)
            for x in self._summed(number):
                state[x.ref()] += self._share(x, known)
        elif kind == "B":
            done = self._backward(number, part, known)
        else:
            done = self._weights(number, part, known)
        for before, after in part.sums:
            if kind != "F" and after.ref() in known:
                state[before.ref()] = known[after.ref()]
        with tf.control_dependencies(done):
            return [tf.identity(x) for x in state.values()]

    def _known(self, microbatch: tf.Tensor) -> Values:
        """What is known of a microbatch from the start."""
        step = self._step
        data, rows = self._microbatches.at(microbatch)
        known = {**self._common, step.microbatch.ref(): microbatch, step.rows.ref(): rows}
        known.update({x.ref(): y for x, y in zip(step.data, data, strict=True)})
        for read in (read for part in self.parts.values() for read in part.reads):
            if isinstance(read.variable, SeedVariable):
                state = self._common[read.value.ref()]
                shift = tf.cast(microbatch, state.dtype) * tf.constant(_SEED_STEP, state.dtype)
                # Other random numbers for each microbatch.
                known[read.value.ref()] = state + tf.stack([shift, tf.zeros_like(shift)])
        return known

    def _forward(self, number: int, part: Part, known: Values) -> list[tf.Operation]:
        known.update(self._transport.take("F", number))
        _call(part.forward, known)
        done = self._transport.put("F", number + 1, known)
        if self._step.seed is not None:
            done += self._queue("kept", number, part.kept).put([known[x.ref()] for x in part.kept])
        if self._is_last(number):
            done += self._keep(self._step.kept_outputs, known)
        return done

    def _backward(self, number: int, part: Part, known: Values) -> list[tf.Operation]:
        kept = self._queue("kept", number, part.kept).take()
        known.update({x.ref(): y for x, y in zip(part.kept, kept, strict=True)})
        known.update(self._transport.take("B", number + 1))
        _call(part.backward, known)
        done = self._transport.put("B", number, known)
        if part.weights is None:
            return done + self._keep_rows(part, known)
        handed_on = [known[x.ref()] for x in part.handed_on]
        return done + self._queue("handed_on", number, part.handed_on).put(handed_on)

    def _weights(self, number: int, part: Part, known: Values) -> list[tf.Operation]:
        handed_on = self._queue("handed_on", number, part.handed_on).take()
        known.update({x.ref(): y for x, y in zip(part.handed_on, handed_on, strict=True)})
        _call(part.weights, known)
        return self._keep_rows(part, known)

    # --- sums over microbatches -------------------------------------------------------------------

    def _add_totals(self, zero: tf.Tensor) -> None:
        """Sums what losses are divided by over microbatches and ranks, before the first op."""
        for part in self.parts.values():
            counts = [x for x, _ in part.totals]
            if not counts:
                continue

            def add(microbatch, *sums, part=part):
                known = self._known(microbatch)
                _call(part.count, known)
                return [y + known[x.ref()] for y, (x, _) in zip(sums, part.totals, strict=True)]

            zeros = [tf.zeros(x.shape, x.dtype) for x in counts]
            _, sums = repeat(zero, self._microbatches.count, add, zeros)
            for (_, total), mine in zip(part.totals, sums, strict=True):
                if total.ref() not in self._common:
                    self._common[total.ref()] = collectives.all_reduce(mine, BATCH_AXES)

    def _summed(self, number: int) -> list[tf.Tensor]:
        """What of a part's results is added up: losses, and averages that layers keep up."""
        step = self._step
        written = [value for _, value in step.parts[number].writes]
        losses = []
        if self._is_last(number):
            losses = [x for _, x, _ in step.trace.loss_metrics]
            losses += [] if step.loss is None else [step.loss]
        unique = {x.ref(): x for x in [*losses, *written]}
        return list(unique.values())

    def _share(self, x: tf.Tensor, known: Values) -> tf.Tensor:
        """A microbatch's part of a sum.

        An average that a layer keeps up is the mean of what it is after each microbatch, by rows. A
        count is the same after each, so that of the first one counts.
        """
        value = known[x.ref()]
        written = {y.ref() for part in self.parts.values() for _, y in part.writes}
        if x.ref() not in written:
            return value
        if not value.dtype.is_floating:
            first = tf.equal(known[self._step.microbatch.ref()], 0)
            return tf.where(first, value, tf.zeros_like(value))
        rows = tf.cast(known[self._step.rows.ref()], value.dtype)
        count = tf.cast(self._microbatches.num_rows(), value.dtype)
        return value * tf.math.divide_no_nan(rows, count)

    def store_writes(self) -> None:
        """Stores what the step has written into variables."""
        for part in self._step.parts:
            for variable, value in part.writes:
                mine = self.sums.get(value.ref())
                if variable.layout.stages is None:
                    # Every stage has it, and one of them has written it.
                    zeros = tf.zeros(variable.shape_of("full"), variable.dtype)
                    mine = zeros if mine is None else mine
                    mine = collectives.all_reduce(mine, "pipe")
                if mine is not None and variable.layout.is_on(self._program.stage):
                    variable.store(self._program, mine)

    # --- queues -----------------------------------------------------------------------------------

    def _queues(self) -> list[Queue]:
        queues = self._transport.queues()
        for number, part in self.parts.items():
            queues.append(self._queue("kept", number, part.kept))
            queues.append(self._queue("handed_on", number, part.handed_on))
            queues += [self._results(x) for x in self._rows_of(part)]
        return queues + [self._results(x) for x in self._step.kept_outputs]

    def _queue(self, kind: str, number: int, like: Sequence[tf.Tensor]) -> Queue:
        return Queue(f"{self._name}_{kind}_{number}", like)

    def _results(self, x: tf.Tensor) -> Queue:
        return Queue(f"{self._name}_{x.name.replace(':', '_').replace('/', '.')}", [x])

    def _keep(self, tensors: Sequence[tf.Tensor], known: Values) -> list[tf.Operation]:
        return [op for x in tensors for op in self._results(x).put([known[x.ref()]])]

    def _keep_rows(self, part: Part, known: Values) -> list[tf.Operation]:
        """Keeps sparse gradients, which are put together at the end."""
        return self._keep(self._rows_of(part), known)

    def _rows_of(self, part: Part) -> list[tf.Tensor]:
        return [x for rows in part.rows for x in (rows.values, rows.indices)]

    def _is_last(self, number: int) -> bool:
        return number == self._schedule.num_parts - 1


def _call(cut: Cut, known: Values) -> None:
    known.update({x.ref(): y for x, y in zip(cut.fetches, cut(known), strict=True)})


def _check_in_turn(order: Sequence[Op]) -> None:
    """Checks that each kind of op takes the microbatches in turn, as the queues do."""
    following: dict[tuple[str, int], int] = {}
    for op in order:
        expected = following.get((op.kind, op.chunk), 0)
        if op.microbatch != expected:
            raise ValueError(
                f"A pipeline takes microbatches in turn. Received: a schedule in which {op.kind} "
                f"of chunk {op.chunk} comes to microbatch {op.microbatch} before {expected}."
            )
        following[op.kind, op.chunk] = expected + 1
