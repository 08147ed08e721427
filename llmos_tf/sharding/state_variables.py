"""State that each rank keeps of its own rows: random streams and metrics."""

import functools
from collections.abc import Callable

import tensorflow as tf

from llmos_tf import _internal, collectives
from llmos_tf.collectives import batch
from llmos_tf.graph.outlined_function import NotABlock
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.sharding.variables import ShardedVariable, run_program
from llmos_tf.spmd.global_trace import current_trace
from llmos_tf.spmd.program import ReplicaProgram, current_program


class SeedVariable(ShardedVariable):
    """State of a `keras.random.SeedGenerator`: another stream for each part of the batch.

    The user sees the state of the first rank, which is the state on one device. A rank whose rows
    of the batch are others adds a constant to the seed, so that dropout masks differ along the
    axes that split the batch and agree along those that hold the same activations.
    """

    def shift_of(self, index: tf.Tensor) -> tf.Tensor:
        """Returns by how much the state of a part of the batch differs from that of one device.

        Args:
            index: of the part, int32 scalar.

        Returns:
            Tensor like the state.
        """
        shift = tf.cast(index, self.dtype) * tf.constant(_SEED_STEP, self.dtype)
        return tf.stack([shift, tf.zeros_like(shift)])

    def _shift(self, rank: int) -> tf.Tensor:
        return self.shift_of(tf.constant(self.mesh.index_along(rank, BATCH_AXES)))

    def read(self) -> tf.Tensor:
        """Returns this rank's state in a program, else the first rank's of the mesh."""
        trace = current_trace()
        if trace is not None:
            return trace.stand_in(self).value()
        program = current_program()
        if program is not None:
            written = None if program.block is None else program.block.written(self)
            return self.part() if written is None else written
        state = self._values[0].value()
        # In another process than the first, what is at hand is another rank's.
        first = self._distribute_strategy.extended.local_ranks[0]
        return state if first == 0 else state - self._shift(first)

    def _get(self):
        return self.read()

    def _write_in_program(self, program, method: str, value: tf.Tensor) -> None:
        program.spare_reads.clear()
        if program.block is not None:
            program.block.write(self, self._changed(method, value))
            return
        getattr(self.component, method)(value)

    def _component_of(self, value: tf.Tensor, rank: int) -> tf.Tensor:
        return value + self._shift(rank)


# A prime of 31 bits, so that seeds of neighbouring ranks share no pattern.
_SEED_STEP = 1_640_531_527


def _of_stand_in(original: Callable) -> Callable:
    """A method of a variable that is the stand-in's in a global trace."""

    @functools.wraps(original)
    def method(variable, *args, **kwargs):
        trace = current_trace()
        if trace is None:
            return original(variable, *args, **kwargs)
        return getattr(trace.stand_in(variable), original.__name__)(*args, **kwargs)

    return method


class MetricVariable(_internal.SyncOnReadVariable):
    """State of a metric: each rank counts its own rows, readers see the sum.

    Ranks that differ only on axes which do not split the batch count the same rows, and are
    counted once.
    """

    _program = None

    # In a global trace the stand-in is read and written.
    assign = _of_stand_in(_internal.SyncOnReadVariable.assign)
    assign_add = _of_stand_in(_internal.SyncOnReadVariable.assign_add)
    assign_sub = _of_stand_in(_internal.SyncOnReadVariable.assign_sub)
    value = _of_stand_in(_internal.SyncOnReadVariable.value)
    read_value = _of_stand_in(_internal.SyncOnReadVariable.read_value)

    @property
    def handle(self) -> tf.Tensor:
        """The resource of the context's component."""
        trace = current_trace()
        return super().handle if trace is None else trace.stand_in(self).handle

    @property
    def total_is_shared(self) -> bool:
        """Whether the value is the sum of what the ranks hold."""
        return self._aggregation == tf.VariableAggregation.SUM

    def component_of(self, program: ReplicaProgram) -> tf.Variable:
        """Returns the component of a program's rank."""
        return self._values[program.position]

    def _update_replica(self, update_fn, value, **kwargs):
        program = current_program()
        if program is not None and program.block is not None:
            raise NotABlock(f"it updates the metric variable {self.name}")
        if program is None or program.rows is None:
            return super()._update_replica(update_fn, value, **kwargs)
        # A rank without rows of its own counts nothing.
        component = self._values[program.position]
        before = component.value()
        update_fn(component, value, **kwargs)
        return component.assign(tf.where(program.rows > 0, component.value(), before))

    def _get(self):
        trace = current_trace()
        if trace is not None:
            return trace.stand_in(self).value()
        if current_program() is not None and _internal.in_synced_reads():
            return self._total()
        return super()._get()

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        if current_trace() is not None:
            return tf.convert_to_tensor(self._get(), dtype=dtype, name=name)
        if current_program() is not None and _internal.in_synced_reads():
            return tf.convert_to_tensor(self._total(), dtype=dtype, name=name)
        return super()._dense_var_to_tensor(dtype, name, as_ref)

    def _get_cross_replica(self):
        extended = self._distribute_strategy.extended
        if extended.spans_processes:
            return run_program(self, self._total)
        if self._aggregation == tf.VariableAggregation.ONLY_FIRST_REPLICA:
            return self._get_replica(0)
        components = [self._values[i] for i in extended.batch_representatives]
        with tf.device("CPU:0"):
            total = tf.add_n([component.read_value() for component in components])
            if self._aggregation == tf.VariableAggregation.MEAN:
                total /= tf.cast(len(components), total.dtype)
        return total

    def _total(self) -> tf.Tensor:
        """The same in a program."""
        mine = self._values[current_program().position].read_value()
        if self._aggregation == tf.VariableAggregation.ONLY_FIRST_REPLICA:
            return batch.of_last_stage(collectives.broadcast(mine, BATCH_AXES))
        total = collectives.all_reduce(mine, BATCH_AXES)
        if self._aggregation == tf.VariableAggregation.MEAN:
            total /= tf.cast(collectives.axis_size(BATCH_AXES), total.dtype)
        return batch.of_last_stage(total)
