"""How a variable of a mesh is written: a full value is stored as parts, one on each rank."""

from typing import Any

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.collectives import batch
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.spmd.global_trace import current_trace
from llmos_tf.spmd.program import ReplicaProgram, current_program


class WrittenByParts:
    """The half of `ShardedVariable` that assigns.

    Outside a program each local rank gets its part. Inside one, a rank assigns what all ranks have
    computed alike, an elementwise update its own part, and a layer a statistic of its own rows,
    which are averaged when somebody reads them.

    Methods have TensorFlow's signatures; of their arguments only the value means something here.
    They return the variable.
    """

    def assign(
        self, value: Any, use_locking: Any = None, name: Any = None, read_value: Any = True
    ) -> "WrittenByParts":
        """Stores a full value; in an elementwise update the rank's own part."""
        return self._write("assign", value)

    def assign_add(
        self, value: Any, use_locking: Any = None, name: Any = None, read_value: Any = True
    ) -> "WrittenByParts":
        """Adds a value, given as to `assign`."""
        return self._write("assign_add", value)

    def assign_sub(
        self, value: Any, use_locking: Any = None, name: Any = None, read_value: Any = True
    ) -> "WrittenByParts":
        """Subtracts a value, given as to `assign`."""
        return self._write("assign_sub", value)

    def _write(self, method: str, value: Any) -> "WrittenByParts":
        value = tf.convert_to_tensor(value, dtype=self.dtype)
        trace = current_trace()
        if trace is not None:
            getattr(trace.stand_in(self), method)(self._checked(value), read_value=False)
            return self
        program = current_program()
        if program is not None:
            with tf.device(self.host):
                self._write_in_program(program, method, value)
            return self
        full = self._checked(value)
        if self.waits:
            getattr(self._values[0], method)(full)
            return self
        for rank, component in zip(
            self._distribute_strategy.extended.local_ranks, self._values, strict=True
        ):
            with tf.device(component.device):
                getattr(component, method)(self._component_of(full, rank))
        return self

    def _write_in_program(self, program, method: str, value: tf.Tensor) -> None:
        check_owner(self, program.strategy)
        if program.update_parts and self.update_layout != self.layout:
            if value.shape.is_compatible_with(self._full_shape):
                value = self.update_layout.part_from_full(value, self.mesh)
            program.pending_parts[id(self)] = (self, self._changed(method, value))
            return
        if not program.in_update:
            if self._is_statistic():
                if program.rows is not None and program.trace is None:
                    # Of a batch without rows a layer knows nothing.
                    value = batch.if_any_rows(self._changed(method, value), self.read())
                    method = "assign"
                program.statistics[id(self)] = self
            else:
                value = self._aggregated(value)
        program.spare_reads.clear()
        if program.block is not None:
            program.block.write(self, self._changed(method, value))
            return
        is_part = program.update_parts and value.shape.is_compatible_with(self.component.shape)
        if not is_part:
            value = self.layout.part_from_full(self._checked(value), self.mesh)
        getattr(self.component, method)(value)

    def store(self, program: ReplicaProgram, value: tf.Tensor) -> None:
        """Stores what a block has written.

        Args:
            program: the program of this rank.
            value: the whole new value, the same on every rank unless it is a statistic.
        """
        in_update = program.in_update or not self._is_statistic()
        with program.having(in_update=in_update):
            self._write_in_program(program, "assign", value)

    def _changed(self, method: str, value: tf.Tensor) -> tf.Tensor:
        """The value after one of the three methods."""
        if method == "assign":
            return value
        return self.read() + value if method == "assign_add" else self.read() - value

    def _checked(self, value: tf.Tensor) -> tf.Tensor:
        """A value that is to be written, of static shape."""
        if not value.shape.is_compatible_with(self._full_shape):
            raise ValueError(
                f"The variable {self.path} has the shape {self._full_shape}. "
                f"Received: a value of shape {tuple(value.shape)}."
            )
        return tf.ensure_shape(value, self._full_shape)

    def _component_of(self, value: tf.Tensor, rank: int) -> tf.Tensor:
        return self.layout.part_of(value, self.mesh, rank)

    def _is_statistic(self) -> bool:
        """Whether layers keep it up by the rows they see, as batch normalization its averages."""
        kinds = (tf.VariableAggregation.NONE, tf.VariableAggregation.MEAN)
        mirrored = self.layout.is_whole and self._aggregation in kinds
        return mirrored and not self.trainable and self.dtype.is_floating

    def _aggregated(self, value: tf.Tensor) -> tf.Tensor:
        """One value from those the replicas assign, as the variable's aggregation says."""
        kind = self._aggregation
        if kind == tf.VariableAggregation.SUM:
            return collectives.all_reduce(value, BATCH_AXES)
        if kind == tf.VariableAggregation.MEAN:
            total = collectives.all_reduce(value, BATCH_AXES)
            return total / tf.cast(self.mesh.batch_ways, value.dtype)
        if kind == tf.VariableAggregation.ONLY_FIRST_REPLICA:
            return collectives.broadcast(value, BATCH_AXES)
        return value

    def _update(self, update_fn, value, **kwargs):
        # What the base class does for the other scatter methods.
        del update_fn, value, kwargs
        raise NotImplementedError(
            f"The variable {self.path} of a mesh takes assign, assign_add, assign_sub, "
            "scatter_add, scatter_sub and scatter_update. Compute the new value and assign it."
        )

    def scatter_add(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = None, name: Any = None
    ) -> "WrittenByParts":
        """Adds `tf.IndexedSlices`, densely."""
        return self.assign_add(self._dense(sparse_delta))

    def scatter_sub(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = None, name: Any = None
    ) -> "WrittenByParts":
        """Subtracts `tf.IndexedSlices`, densely."""
        return self.assign_sub(self._dense(sparse_delta))

    def scatter_update(
        self, sparse_delta: tf.IndexedSlices, use_locking: Any = None, name: Any = None
    ) -> "WrittenByParts":
        """Sets rows to those of `tf.IndexedSlices`."""
        rows = tf.convert_to_tensor(sparse_delta.indices)[:, tf.newaxis]
        return self.assign(tf.tensor_scatter_nd_update(self.read(), rows, sparse_delta.values))

    def _dense(self, slices: tf.IndexedSlices) -> tf.Tensor:
        rows = tf.convert_to_tensor(slices.indices)[:, tf.newaxis]
        return tf.scatter_nd(rows, slices.values, tf.constant(self._full_shape, rows.dtype))


def average_statistics(program: ReplicaProgram) -> None:
    """Gives every rank the mean of the statistics that the ranks have updated by their rows.

    Called when one of them is read, and at the end of a program: one collective for all of them.

    Args:
        program: the program of this rank.
    """
    variables = list(program.statistics.values())
    program.statistics.clear()
    for dtype in sorted({variable.dtype for variable in variables}, key=str):
        components = [v.component for v in variables if v.dtype == dtype]
        flat = tf.concat([tf.reshape(component.value(), [-1]) for component in components], 0)
        lengths = [component.shape.num_elements() for component in components]
        mean = batch.if_any_rows(batch.mean(flat), flat)
        for component, part in zip(components, tf.split(mean, lengths), strict=True):
            component.assign(tf.reshape(part, component.shape))


def check_owner(variable: Any, strategy: tf.distribute.Strategy) -> None:
    """Checks that a program of `strategy` may use a variable.

    Args:
        variable: a distributed variable.
        strategy: the strategy whose program is being traced.

    Raises:
        ValueError: the variable was made under the scope of another one.
    """
    if variable.distribute_strategy is not strategy:
        raise ValueError(
            f"The variable {variable.name} was made under the scope of another strategy than the "
            "one that runs this function. Make the variables that a function uses under the scope "
            "of the strategy that runs it."
        )
