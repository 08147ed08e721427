"""Variables of a mesh: one component per rank, one value for everybody who reads them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import _internal, batch, collectives
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.program import ReplicaProgram, current_program
from llmos_tf.sharding.layout import Layout


class ShardedVariable(_internal.MirroredVariable):
    """A variable whose components, one on each device, are parts of one value.

    Whoever reads it sees the full tensor: outside a program it is put together from the parts,
    inside one it is gathered by collectives whose gradient goes back to the parts. So a layer that
    knows nothing of layouts is right as it is; a parallel layer reads `sharding.local_slice`.
    Assigning a full tensor stores each rank's part. Elementwise optimizers see the rank's own part
    (`program.update_parts`).

    Args:
        strategy: the mesh strategy.
        components: one `tf.Variable` for each local rank.
        aggregation: `tf.VariableAggregation` of values assigned in replicas.
        layout: how the value is cut for storage.
        update_layout: how it is cut for the optimizer, whose state is stored so (ZeRO stages 1
            and 2 cut it further than the value itself).
        full_shape: shape of the whole value.
        path: the Keras path, for messages.
    """

    # The program of `run_program`, once there is one.
    _program = None
    # Makes the components, while their place is not known.
    _make_components: Callable | None = None

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        components: list[tf.Variable],
        aggregation: tf.VariableAggregation,
        layout: Layout,
        update_layout: Layout,
        full_shape: tuple[int, ...],
        path: str,
    ):
        self._first_id = components[0]._unique_id
        super().__init__(strategy, components, aggregation)
        self.layout = layout
        self.update_layout = update_layout
        self.path = path
        self._full_shape = full_shape

    @property
    def _unique_id(self) -> str:
        # By it an optimizer knows the variable, also when it has got other components.
        return self._first_id

    @property
    def shape(self) -> tf.TensorShape:
        """Shape of what the context reads: the whole value, or a rank's part in an update."""
        program = current_program()
        if program is None or not program.update_parts:
            return tf.TensorShape(self._full_shape)
        component = self.component.shape
        extra = self.update_layout.flat[len(self.layout.flat) :]
        if not extra:
            return component
        return tf.TensorShape([-(-component.num_elements() // self.mesh.axis_size(extra))])

    def get_shape(self) -> tf.TensorShape:
        """Returns the shape of what the context reads."""
        return self.shape

    @property
    def mesh(self):
        """The mesh over which it lies."""
        return self._distribute_strategy.extended.mesh

    @property
    def component(self) -> tf.Variable:
        """The part of the rank for which a program is traced."""
        return self._values[current_program().position]

    # --- stages ----------------------------------------------------------------------------------

    def wait(self, make: Callable[[tf.Tensor, Layout], list[tf.Variable]]) -> None:
        """Leaves open which stages hold it; until then it lies on the host.

        Args:
            make: makes the components of a value and a layout.
        """
        self._make_components = make
        # What is placed with it: the state of its optimizer.
        self.companions: list[ShardedVariable] = []

    @property
    def waits(self) -> bool:
        """Whether it is not known yet which stages hold it."""
        return self._make_components is not None

    def place(self, stages: tuple[int, ...] | None) -> None:
        """Moves it to the devices of its stages.

        Args:
            stages: positions on `pipe`, in order; None for all.
        """
        self.layout = dataclasses.replace(self.layout, stages=stages)
        self.update_layout = dataclasses.replace(self.update_layout, stages=stages)
        with tf.init_scope():
            components = self._make_components(self._values[0].value(), self.layout)
        self._make_components = None
        _internal.MirroredVariable.__init__(
            self, self._distribute_strategy, components, self._aggregation
        )
        for companion in self.companions:
            companion.place(stages)
        self.companions.clear()

    # --- reading ---------------------------------------------------------------------------------

    def part(self) -> tf.Tensor:
        """Returns what the calling rank stores, inside a program."""
        program = current_program()
        check_owner(self, program.strategy)
        if program.block is not None:
            return program.block.read("part", self, self.part)
        if self.layout.stages is None or program.own_stage or program.in_update:
            return self.component.value()
        return self._from_its_stage()

    def _from_its_stage(self) -> tf.Tensor:
        """The part, in a program that every stage runs alike: sent by the first that holds it."""
        stage, layout = current_program().stage, self.layout
        shape = self.shape_of("part")

        @tf.custom_gradient
        def sent(part):
            mine = part if stage == layout.stages[0] else tf.zeros(shape, self.dtype)
            # Every stage computes the same of it, so whoever holds it has all of its gradient.
            return collectives.all_reduce(mine, "pipe"), (
                lambda dy: dy if layout.is_on(stage) else tf.zeros_like(part)
            )

        return sent(self.component.value())

    def slice(self, for_lookups: bool = False) -> tf.Tensor:
        """Returns what the calling rank computes with, inside a program: no flat cuts.

        Args:
            for_lookups: whether rows of it are looked up, and `sparse_gradient` asked for.

        Returns:
            Tensor of the layout's `slice_shape`.
        """
        block = current_program().block
        if block is not None and block.lifts(self.layout):
            return block.read("slice", self, lambda: self.slice(for_lookups))
        part = self._noted_part() if for_lookups else self.part()
        if not self.layout.flat:
            return part
        return _with_counted_gradient(
            self.layout.slice_from_part(part, self._full_shape, self.mesh)
        )

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Returns the shape of a value of the variable on a rank that holds it.

        Args:
            kind: "part", what the rank stores; "slice", what it computes with; or "full".

        Returns:
            The shape.
        """
        if kind == "full":
            return self._full_shape
        shape = self.layout.part_shape if kind == "part" else self.layout.slice_shape
        return shape(self._full_shape, self.mesh)

    def update_part(self) -> tf.Tensor:
        """Returns what the calling rank's optimizer updates, inside a program."""
        extra = self.update_layout.flat[len(self.layout.flat) :]
        if not extra:
            return self.part()
        return Layout.cut_flat(tf.reshape(self.part(), [-1]), extra, self.mesh)

    def read(self) -> tf.Tensor:
        """Returns the value as the context sees it."""
        program = current_program()
        if program is None:
            return self._joined()
        written = None if program.block is None else program.block.written(self)
        if written is not None:
            return batch.mean(written) if self._is_statistic() else written
        if id(self) in program.statistics:
            # Read again in the step that updated it.
            average_statistics(program)
        if program.update_parts:
            pending = program.pending_parts.get(id(self))
            return self.update_part() if pending is None else pending[1]
        return self._gathered()

    def _joined(self) -> tf.Tensor:
        if self.waits or (self.layout.is_whole and self.layout.stages is None):
            return self._values[0].value()
        extended = self._distribute_strategy.extended
        cut = [axis for axis in (*self.layout.dims, *self.layout.flat) if axis is not None]
        staged = [] if self.layout.stages is None else ["pipe"]
        if not extended.in_one_process([*cut, *staged]):
            return run_program(self, self.read)
        parts = {}
        for rank, component in zip(extended.local_ranks, self._values, strict=True):
            where = self.mesh.coordinate(rank)
            if self.layout.is_on(where["pipe"]):
                first = {} if self.layout.stages is None else {"pipe": self.layout.stages[0]}
                at = self.mesh.rank(**first, **{axis: where[axis] for axis in cut})
                parts[at] = component.value()
        # On the host: nothing that has a full copy may sit on an accelerator.
        with tf.device("CPU:0"):
            return self.layout.join(parts, self._full_shape, self.mesh)

    def _gathered(self) -> tf.Tensor:
        if self.layout.is_whole:
            return self.part()
        program = current_program()
        block = program.block
        if block is not None and (block.lifts(self.layout) or program.looks_up):
            # That all reads were lookups is seen outside of blocks.
            return block.read("full", self, self._gathered)
        if block is not None:
            # Again in the backward pass, instead of being kept.
            full = self.layout.full_from_part(self.part(), self._full_shape, self.mesh)
            return _with_counted_gradient(full)
        full = self.layout.full_from_part(self._noted_part(), self._full_shape, self.mesh)
        reads = program.read_gradients.setdefault(id(self), [])

        # A lookup has a sparse gradient, and Keras's adaptive optimizers do not update by it as by
        # its dense sum. The gather makes it dense, so it is kept here for the step.
        @tf.custom_gradient
        def observed(full):
            def gradient(upstream):
                reads.append(upstream if isinstance(upstream, tf.IndexedSlices) else None)
                return batch.counted(tf.convert_to_tensor(upstream))

            return tf.identity(full), gradient

        return observed(full)

    def _noted_part(self) -> tf.Tensor:
        """The part, whose gradient is known again when the optimizer is given it."""
        noted = current_program().part_gradients.setdefault(id(self), [])

        @tf.custom_gradient
        def observed(part):
            def gradient(upstream):
                noted.append(tf.identity(upstream))
                return noted[-1]

            return tf.identity(part), gradient

        return observed(self.part())

    def sparse_gradient(self, gradient: tf.Tensor) -> tf.IndexedSlices | None:
        """Returns this rank's gradient of the whole value, where every read of it was a lookup.

        Args:
            gradient: of the part, as the optimizer is given it.

        Returns:
            The rows; None for a dense gradient, or one that is not as the tape has made it.
        """
        program = current_program()
        noted = {tensor.ref() for tensor in program.part_gradients.get(id(self), [])}
        reads = list(program.read_gradients.get(id(self), []))
        # The next gradient of this program has reads of its own.
        program.read_gradients.get(id(self), []).clear()
        if not reads or any(read is None for read in reads):
            return None
        summed = gradient.op.inputs if gradient.op.type in ("AddN", "AddV2") else [gradient]
        if not noted.issuperset(tensor.ref() for tensor in summed):
            return None
        return tf.IndexedSlices(
            tf.concat([tf.convert_to_tensor(read.values) for read in reads], 0),
            tf.concat([tf.convert_to_tensor(read.indices) for read in reads], 0),
            tf.constant(self._full_shape),
        )

    def _get(self):
        # What the base class converts, compares and computes with.
        return self.read()

    def _get_cross_replica(self):
        return tf.identity(self._joined())

    def value(self) -> tf.Tensor:
        """Returns the value as the context sees it."""
        return self.read()

    def read_value(self) -> tf.Tensor:
        """Returns a copy of the value as the context sees it."""
        return tf.identity(self.read())

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        del as_ref
        return tf.convert_to_tensor(self.read(), dtype=dtype, name=name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        # numpy converts by it; the base class's returns no array for a scalar.
        del copy
        return np.asarray(self.numpy(), dtype=dtype)

    def __int__(self) -> int:
        return int(self.numpy())

    def __float__(self) -> float:
        return float(self.numpy())

    def __bool__(self) -> bool:
        return bool(self.numpy())

    def sparse_read(self, indices: tf.Tensor, name: str | None = None) -> tf.Tensor:
        """Gathers rows; `tf.gather` calls it.

        Args:
            indices: row numbers.
            name: name of the op.

        Returns:
            The rows.
        """
        return tf.gather(self.read(), indices, name=name)

    # --- writing ---------------------------------------------------------------------------------

    def assign(
        self,
        value: Any,
        use_locking: bool = False,
        name: str | None = None,
        read_value: bool = True,
    ) -> "ShardedVariable":
        """Stores a full tensor, or in a program also a rank's own part.

        Args:
            value: the full value; in an elementwise update, a part.
            use_locking: passed on.
            name: passed on.
            read_value: passed on.

        Returns:
            This variable.
        """
        return self._write("assign", value)

    def assign_add(
        self,
        value: Any,
        use_locking: bool = False,
        name: str | None = None,
        read_value: bool = True,
    ) -> "ShardedVariable":
        """Adds; arguments as in `assign`.

        Args:
            value: what to add.
            use_locking: passed on.
            name: passed on.
            read_value: passed on.

        Returns:
            This variable.
        """
        return self._write("assign_add", value)

    def assign_sub(
        self,
        value: Any,
        use_locking: bool = False,
        name: str | None = None,
        read_value: bool = True,
    ) -> "ShardedVariable":
        """Subtracts; arguments as in `assign`.

        Args:
            value: what to subtract.
            use_locking: passed on.
            name: passed on.
            read_value: passed on.

        Returns:
            This variable.
        """
        return self._write("assign_sub", value)

    def _write(self, method: str, value: Any) -> "ShardedVariable":
        value = tf.convert_to_tensor(value, dtype=self.dtype)
        program = current_program()
        if program is not None:
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
        self, sparse_delta: tf.IndexedSlices, use_locking: bool = False, name: str | None = None
    ) -> "ShardedVariable":
        """Adds `tf.IndexedSlices`, densely.

        Args:
            sparse_delta: the slices.
            use_locking: passed on.
            name: passed on.

        Returns:
            This variable.
        """
        return self.assign_add(self._dense(sparse_delta))

    def scatter_sub(
        self, sparse_delta: tf.IndexedSlices, use_locking: bool = False, name: str | None = None
    ) -> "ShardedVariable":
        """Subtracts `tf.IndexedSlices`, densely.

        Args:
            sparse_delta: the slices.
            use_locking: passed on.
            name: passed on.

        Returns:
            This variable.
        """
        return self.assign_sub(self._dense(sparse_delta))

    def scatter_update(
        self, sparse_delta: tf.IndexedSlices, use_locking: bool = False, name: str | None = None
    ) -> "ShardedVariable":
        """Sets rows to those of `tf.IndexedSlices`.

        Args:
            sparse_delta: the slices.
            use_locking: passed on.
            name: passed on.

        Returns:
            This variable.
        """
        rows = tf.convert_to_tensor(sparse_delta.indices)[:, tf.newaxis]
        return self.assign(tf.tensor_scatter_nd_update(self.read(), rows, sparse_delta.values))

    def _dense(self, slices: tf.IndexedSlices) -> tf.Tensor:
        rows = tf.convert_to_tensor(slices.indices)[:, tf.newaxis]
        return tf.scatter_nd(rows, slices.values, tf.constant(self._full_shape, rows.dtype))

    # --- TensorFlow's checkpoints ----------------------------------------------------------------

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return {"VARIABLE_VALUE": self.read()}

    def _export_to_saved_model_graph(self, *args, **kwargs):
        if not self.layout.is_whole:
            # A SavedModel would have one value for all parts, and read it as if it were a part.
            raise ValueError(
                f"The variable {self.path} is cut over the mesh, and tf.saved_model.save cannot "
                "write that. Use model.export(path), which writes whole values."
            )
        return super()._export_to_saved_model_graph(*args, **kwargs)

    def _restore_from_tensors(self, restored_tensors: dict[str, tf.Tensor]) -> "ShardedVariable":
        return self.assign(restored_tensors["VARIABLE_VALUE"])


def _with_counted_gradient(value: tf.Tensor) -> tf.Tensor:
    """A gathered value, whose gradient does not count on a rank without rows of its own."""
    if current_program().rows is None:
        return value

    @tf.custom_gradient
    def counted(value):
        return tf.identity(value), batch.counted

    return counted(value)


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
        for component, part in zip(components, tf.split(batch.mean(flat), lengths), strict=True):
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


def run_program(variable: Any, read: Callable[[], tf.Tensor]) -> tf.Tensor:
    """Returns what a variable's `read` returns in a program, the same on every rank.

    Other processes hold some of the variable, so they all have to read it.

    Args:
        variable: a distributed variable, which keeps the program.
        read: its method.

    Returns:
        The value.
    """
    if variable._program is None:

        def run():
            engine = variable._distribute_strategy.extended.engine
            result = engine.run(read, (), {})
            is_split = isinstance(result, tf.distribute.DistributedValues)
            return result.values[0] if is_split else result

        # On the variable, which it must not outlive.
        variable._program = tf.function(run, autograph=False)
    return variable._program()
