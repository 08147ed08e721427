"""A step of a model as a pipeline, in the program of a stage."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.collectives import batch
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.sharding import ShardedVariable, read_for_all
from llmos_tf.spmd.program import require_program
from llmos_tf.strategies.pipeline.microbatches import Microbatches, of_any_length
from llmos_tf.strategies.pipeline.placement import placement_of
from llmos_tf.strategies.pipeline.shared_weights import SharedWeights
from llmos_tf.strategies.pipeline.stage_executor import StageRun
from llmos_tf.strategies.pipeline.traced_step import Step, StepTrace, trace_step

# Which value of a variable is read.
Key = tuple[str, int]


class Pipeline:
    """Runs a step of a model on this stage; the other stages' programs run the same.

    Args:
        model: a model that was placed.
        step: of the data of a microbatch, to its loss, or None, and other outputs.
        data: this rank's rows, nested tensors.
        seed: gradient of what is minimized by the loss, or None for the forward pass alone.
    """

    def __init__(
        self, model: keras.Model, step: Step, data: Any, seed: Callable[[], tf.Tensor] | None
    ):
        self._program = program = require_program("A pipeline")
        self._model = model
        extended = program.strategy.extended
        # By it `warn_if_not_pipelined` knows.
        extended.num_pipelines += 1
        count = extended.options.num_microbatches
        data = of_any_length(data, count)
        flat = tf.nest.flatten(data, expand_composites=True)
        tensors = [x for x in flat if isinstance(x, tf.Tensor)]
        self._microbatches = microbatches = Microbatches(program, tensors, count)
        first = iter(microbatches.at(0)[0])
        sample = [next(first) if isinstance(x, tf.Tensor) else x for x in flat]
        self._step: StepTrace = program.share(
            lambda: trace_step(
                program,
                step,
                tf.nest.pack_sequence_as(data, sample, expand_composites=True),
                placement_of(model).begins_in,
                seed is not None,
                microbatches.are_uneven,
            )
        )
        number = program.share(lambda: program.keys.next_instance("trace"))
        name = f"pipeline_{program.keys.first}_{number}_{program.stage}"
        self._merge_notes()
        self._tape = tf.GradientTape(persistent=True)
        with program.having(own_stage=True):
            with self._tape:
                self._values = self._read()
                # The same on all ranks that hold a weight.
                self._penalty = batch.same(self._regularization())
            self._seed = None if seed is None else tf.cast(seed(), self._step.loss.dtype)
            known = {r.value.ref(): self._values[_key(r)] for r in self._reads()}
            self._run = StageRun(
                program, self._step, extended.schedule, microbatches, known, self._seed, name
            )
            self._run.run()
            self._run.store_writes()
            self._advance_seeds(known)

    @property
    def is_last(self) -> bool:
        """Whether this stage has the last part, and so the results."""
        return self._program.stage == self._program.strategy.extended.result_stage

    def loss(self) -> tf.Tensor:
        """Returns the loss of the batch, the same on every rank of every stage."""
        mine = self._penalty
        if self.is_last:
            shares = self._run.sums[self._step.loss.ref()]
            mine += collectives.all_reduce(shares, BATCH_AXES)
        return collectives.all_reduce(mine, "pipe")

    def outputs(self) -> Any:
        """Returns what the step has returned beside the loss, for all of this rank's rows.

        Zeros of that shape on other stages than that of the last part.
        """
        return tf.nest.map_structure(self._output, self._step.outputs)

    def update_loss_metrics(self) -> None:
        """Updates the metrics that track losses, by those of the whole batch."""
        count = self._step.trace.num_microbatches
        for metric, loss, weight in self._step.trace.loss_metrics:
            if not self.is_last:
                continue
            total = collectives.all_reduce(self._run.sums[loss.ref()], BATCH_AXES)
            metric.update_state(total, None if weight is None else weight * count)

    def gradients(self, variables: list[Any]) -> list[Any]:
        """Returns the gradients of this rank's rows, for the variables that this stage holds.

        Args:
            variables: `keras.Variable`s.

        Returns:
            Gradients as a tape gives them; None for the variables of other stages.
        """
        program = self._program
        mine = [v for v in variables if _stored(v).layout.is_on(program.stage)]
        stored = [_stored(v) for v in mine]
        sums, rows = self._summed()
        targets = [self._values[key] for key in sums]
        with program.having(own_stage=True):
            gradients = self._tape.gradient(
                [*targets, self._penalty],
                stored,
                output_gradients=[*map(tf.convert_to_tensor, sums.values()), self._seed],
            )
        for i, variable in enumerate(stored):
            whole = [sums.get((kind, id(variable))) for kind in ("part", "full")]
            sparse = next((g for g in whole if isinstance(g, tf.IndexedSlices)), None)
            if sparse is not None and variable.layout.is_whole:
                gradients[i] = sparse
            elif sparse is not None:
                program.read_gradients[id(variable)] = [sparse]
            elif id(variable) in rows:
                program.read_gradients[id(variable)] = [rows[id(variable)]]
        shared = program.share(lambda: SharedWeights(program, [_stored(v) for v in variables]))
        trained = {id(read.variable) for part in self._step.parts for read, _ in part.gradients}
        summed = {
            id(v_): shared.summed(program, g, v)
            if id(v) in trained or v_.regularizer is not None
            else g
            for g, v, v_ in zip(gradients, stored, mine, strict=True)
        }
        return [summed.get(id(variable)) for variable in variables]

    # --- inside -----------------------------------------------------------------------------------

    def _reads(self) -> list:
        """What this stage reads: the values of its parts, and the states of all random streams."""
        schedule, stage = self._program.strategy.extended.schedule, self._program.stage
        mine = {schedule.part_of(stage, chunk) for chunk in range(schedule.num_chunks)}
        reads = [read for number in sorted(mine) for read in self._step.parts[number].reads]
        seeds = [read for read in self._step.trace.reads if read.is_seed]
        return [*(read for read in reads if not read.is_seed), *seeds]

    def _read(self) -> dict[Key, tf.Tensor]:
        values: dict[Key, tf.Tensor] = {}
        looked_up = {key for part in self._step.parts for key, _ in part.lookups}
        for read in self._reads():
            if _key(read) in values:
                continue
            variable = read.variable
            if read.kind == "slice":
                value = variable.slice(for_lookups=id(variable) in looked_up)
            else:
                value = variable.read() if read.kind == "full" else variable.part()
            values[_key(read)] = tf.identity(value)
        return values

    def _regularization(self) -> tf.Tensor:
        """The regularizers of the weights whose first stage this is, if the step adds them."""
        terms = [tf.zeros([], keras.config.floatx())]
        if self._step.loss is not None:
            terms = [tf.zeros([], self._step.loss.dtype)]
        if not self._step.trace.regularizes:
            return terms[0]
        for variable in self._model.trainable_variables:
            layout = _stored(variable).layout
            first = 0 if layout.stages is None else layout.stages[0]
            if variable.regularizer is not None and first == self._program.stage:
                terms.append(tf.cast(variable.regularizer(read_for_all(variable)), terms[0].dtype))
        return tf.add_n(terms)

    def _merge_notes(self) -> None:
        """Takes over what the traced step has said of variables."""
        program, inner = self._program, self._step.program
        program.looked_up_by_position |= inner.looked_up_by_position
        for key, axes in inner.partial_gradients.items():
            merged = (*program.partial_gradients.get(key, ()), *axes)
            program.partial_gradients[key] = program.mesh.canonical_axes(merged)

    def _advance_seeds(self, known: dict) -> None:
        states = self._step.seeds(known)
        written = {x.ref(): variable for variable, x in self._step.trace.writes}
        for x, state in zip(self._step.seeds.fetches, states, strict=True):
            written[x.ref()].assign(state)

    def _output(self, x: Any) -> Any:
        if not isinstance(x, tf.Tensor):
            return x
        if self.is_last:
            values = enumerate(self._run.all_of(x))
            return _joined([self._microbatches.without_lent(i, value) for i, value in values])
        shape = [1 if length is None else length for length in x.shape]
        if shape:
            shape[0] = self._microbatches.length()
            if x.shape[0] is not None:
                shape[0] = x.shape[0] * self._microbatches.count
        return tf.zeros(tf.stack(shape), x.dtype)

    def _summed(self) -> tuple[dict[Key, Any], dict[int, tf.IndexedSlices]]:
        """Gradients of what was read, summed over microbatches, and rows that were looked up."""
        dense: dict[Key, list[tf.Tensor]] = {}
        sparse: dict[Key, list[tf.IndexedSlices]] = {}
        rows: dict[int, list[tf.IndexedSlices]] = {}
        for part in self._run.parts.values():
            after = iter(part.sums)
            for read, gradient in part.gradients:
                if isinstance(gradient, tf.IndexedSlices):
                    sparse.setdefault(_key(read), []).append(self._all_rows(gradient, read))
                else:
                    before, _ = next(after)
                    dense.setdefault(_key(read), []).append(self._run.sums[before.ref()])
            for key, gradient in part.lookups:
                rows.setdefault(key, []).append(self._all_rows(gradient, None))
        sums: dict[Key, Any] = {key: tf.add_n(values) for key, values in dense.items()}
        for key, slices in sparse.items():
            joined = _joined_rows(slices)
            sums[key] = sums[key] + tf.convert_to_tensor(joined) if key in sums else joined
        return sums, {key: _joined_rows(slices) for key, slices in rows.items()}

    def _all_rows(self, gradient: tf.IndexedSlices, read: Any) -> tf.IndexedSlices:
        """A sparse gradient of all microbatches, in the order of the batch."""
        values, indices = self._run.all_of(gradient.values), self._run.all_of(gradient.indices)
        shape = gradient.dense_shape if read is None else tf.constant(read.value.shape.as_list())
        if read is not None and id(read.variable) in self._program.looked_up_by_position:
            # Positions are the same in each microbatch, and their gradient a sum over it.
            return tf.IndexedSlices(tf.add_n(values), indices[0], shape)
        return tf.IndexedSlices(tf.concat(values, 0), tf.concat(indices, 0), shape)


def _joined(values: list[tf.Tensor]) -> tf.Tensor:
    """Rows of all microbatches; what has none is the mean."""
    if values[0].shape.rank:
        return tf.concat(values, 0)
    return tf.add_n(values) / tf.cast(len(values), values[0].dtype)


def _joined_rows(slices: list[tf.IndexedSlices]) -> tf.IndexedSlices:
    if len(slices) == 1:
        return slices[0]
    return tf.IndexedSlices(
        tf.concat([x.values for x in slices], 0),
        tf.concat([x.indices for x in slices], 0),
        slices[0].dense_shape,
    )


def _key(read: Any) -> Key:
    return read.kind, id(read.variable)


def _stored(variable: Any) -> ShardedVariable:
    """The mesh's variable inside a `keras.Variable`."""
    return getattr(variable, "_value", variable)
