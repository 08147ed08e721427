"""Variables of a mesh: one component per rank, one value for everybody who reads them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import _internal, collectives
from llmos_tf.collectives import batch
from llmos_tf.sharding.assignment import WrittenByParts, average_statistics, check_owner
from llmos_tf.sharding.layout import Layout
from llmos_tf.spmd.global_trace import current_trace
from llmos_tf.spmd.program import HOW_TO_TRAIN, current_program


class ShardedVariable(WrittenByParts, _internal.MirroredVariable):
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
        host: the device of the host, where the components lie there and not on their ranks'
            devices; None for on their devices.
    """

    # The program of `run_program`, once there is one.
    _program = None
    # Whether its gradient is its next value, as that of a float8 scale.
    is_overwritten = False
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
        host: str | None = None,
    ):
        self._first_id = components[0]._unique_id
        super().__init__(strategy, components, aggregation)
        self.layout = layout
        self.update_layout = update_layout
        self.path = path
        self.host = host
        # What compression of its gradient keeps from step to step, by what it is: distributed
        # variables, each rank's its own (`strategies.gradients.compression`).
        self.reduction_state: dict[tuple, Any] = {}
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
    def handle(self) -> tf.Tensor:
        """The resource that a tape knows it by: outside of a program that of the first rank."""
        trace = current_trace()
        if trace is not None:
            return trace.stand_in(self).handle
        is_outside = tf.distribute.in_cross_replica_context()
        return self._values[0].handle if is_outside else super().handle

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
            return self._stored()
        return self._from_its_stage()

    def _stored(self) -> tf.Tensor:
        """The component, on the rank's device; in an update where it lies."""
        program = current_program()
        if self.host is None:
            return self.component.value()
        if program.in_update:
            return self._on_host()
        return program.once_in_call(("copy", id(self)), self._copied)

    def _on_host(self) -> tf.Tensor:
        # Not `value()`, which is placed by whoever uses it.
        with tf.device(self.host):
            return self.component.read_value()

    def _copied(self) -> tf.Tensor:
        value = self._on_host()
        with tf.device(None):
            return tf.identity(value)

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

        return sent(self._stored())

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
        if self.layout.flat and not for_lookups:
            return current_program().once_in_call(("slice", id(self)), self._gathered_slice)
        part = self._noted_part() if for_lookups else self.part()
        return self._gathered_slice(part) if self.layout.flat else part

    def _gathered_slice(self, part: tf.Tensor | None = None) -> tf.Tensor:
        return _with_counted_gradient(self._gathered_in_turn("slice", part))

    def _gathered_in_turn(self, kind: str, part: tf.Tensor | None = None) -> tf.Tensor:
        """What is gathered of the part, when it is the turn of the block that reads it."""
        gathering = current_program().gathering
        if gathering is not None:
            return gathering.gather(self, kind, part)
        return self.gathered_from(kind, self.part_to_gather(kind) if part is None else part)

    def part_to_gather(self, kind: str) -> tf.Tensor:
        """Returns what a read of the variable gathers, inside a program.

        Args:
            kind: "slice" or "full", as of `shape_of`.

        Returns:
            What the rank stores.
        """
        return self._noted_part() if kind == "full" else self.part()

    def gathered_from(self, kind: str, part: tf.Tensor) -> tf.Tensor:
        """Gathers a value of the variable, inside a program.

        Args:
            kind: "slice" or "full", as of `shape_of`.
            part: what the rank stores.

        Returns:
            The value.
        """
        gather = self.layout.full_from_part if kind == "full" else self.layout.slice_from_part
        return gather(part, self._full_shape, self.mesh)

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
        with tf.device(self.host):
            return Layout.cut_flat(tf.reshape(self.part(), [-1]), extra, self.mesh)

    def read(self) -> tf.Tensor:
        """Returns the value as the context sees it."""
        trace = current_trace()
        if trace is not None:
            return trace.stand_in(self).value()
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
            full = self.layout.join(parts, self._full_shape, self.mesh)
            return full if not self.trainable else _without_gradient(full, self.path)

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
            return _with_counted_gradient(self.gathered_from("full", self.part()))
        full = self._gathered_in_turn("full")
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


def _without_gradient(full: tf.Tensor, path: str) -> tf.Tensor:
    """A whole value, of which a tape could only give the gradient of the first rank's part."""
    return tf.raw_ops.PreventGradient(
        input=full,
        message=f"The variable {path} is cut over the mesh, and its gradient was asked for outside "
        f"of strategy.run. {HOW_TO_TRAIN}",
    )


def _with_counted_gradient(value: tf.Tensor) -> tf.Tensor:
    """A gathered value, whose gradient does not count on a rank without rows of its own."""
    if current_program().rows is None:
        return value

    @tf.custom_gradient
    def counted(value):
        return tf.identity(value), batch.counted

    return counted(value)


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
