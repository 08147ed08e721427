"""The program of a device: what code in a replica knows about the rank it runs on.

The engine traces a replica function once and calls it on every device (docs/adr/0001). While it
traces, a `ReplicaProgram` is the replica context: it tells a rank's coordinate as a tensor, gives
collectives their group keys, and remembers the decisions that hold for this one trace.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.mesh import AXES, Mesh
from llmos_tf.spmd.collective_keys import CollectiveKeys

# For errors of custom loops.
HOW_TO_TRAIN = (
    "Call the step that llmos_tf.training.make_train_step(model, optimizer, loss) returns; or pass "
    "a function with the GradientTape and the optimizer in it to strategy.run, as TensorFlow's "
    "guide to custom training loops does."
)


class ReplicaProgram(_internal.ReplicaContext):
    """The replica context of the traced program; `current_program()` finds it.

    Args:
        strategy: the mesh strategy that traces.
        mesh: its mesh.
        coordinate: int32 ``[axes]``, the calling rank's coordinate, an input of the program.
        token: resource handle that orders this rank's collectives.
        gradient_token: resource handle that orders those that sum gradients, which wait for no
            other: a gradient that is there can be summed while the backward pass communicates.
        keys: collective keys of the strategy.
        communication: "ring", "nccl" or "auto".
        sequence_parallel: whether activations between blocks are split along positions over the
            `tensor` axis.
        context_method: "ring" or "ulysses", how attention sees the positions of the other ranks of
            the `context` axis.
        position: among this process's ranks, of the one for which the program is traced.
        stage: the position of its ranks on the `pipe` axis.
    """

    def __init__(
        self,
        strategy: Any,
        mesh: Mesh,
        coordinate: tf.Tensor,
        token: tf.Tensor,
        gradient_token: tf.Tensor,
        keys: CollectiveKeys,
        communication: str,
        sequence_parallel: bool = False,
        context_method: str = "ring",
        position: int = 0,
        stage: int = 0,
    ):
        # The base class takes a variable's component by this.
        super().__init__(strategy, replica_id_in_sync_group=position)
        self.mesh = mesh
        self.position = position
        self.stage = stage
        # Captured here, in the outermost graph: the backward body of a loop cannot capture an eager
        # tensor that its forward body did not.
        self.token = tf.compat.v1.get_default_graph().capture(token)
        self.gradient_token = tf.compat.v1.get_default_graph().capture(gradient_token)
        self.keys = keys
        self.communication = communication
        self.sequence_parallel = sequence_parallel and mesh.axis_size("tensor") > 1
        self.context_method = context_method
        # Set while an optimizer runs: what it assigns is the same on every rank already, and with
        # `update_parts` it reads and writes each rank's own part of a variable only.
        self.in_update = False
        # The device on which an optimizer computes; None for the rank's own.
        self.update_device: str | None = None
        # Whether only variables that this stage holds are used, as in a pipeline.
        self.own_stage = False
        self.update_parts = False
        self.gradients_synced = False
        # Set while gradients are summed over the mesh.
        self.reduces_gradients = False
        # Whether the shapes of what ranks exchange are known to agree.
        self.shapes_agree = False
        # Set while a metric counts this rank's rows.
        self.in_metric = False
        # Whether the program has a collective.
        self.communicates = False
        # Whether an output layer may leave its logits cut by vocabulary, and along which axis the
        # last one did.
        self.sharded_logits = False
        self.logits_axis: str | None = None
        # How ranks that have the same rows split the activations of the model that is being called,
        # and those of the logits that the last one has left as they were; see
        # `llmos_tf.layers.activation_sharding`. None where they do not.
        self.stream: Any = None
        self.logits_stream: Any = None
        # New values of parts whose variables are stored whole, until they are gathered, by `id`.
        self.pending_parts: dict[int, tuple[Any, tf.Tensor]] = {}
        # Gradients of the reads of each gathered variable, by `id`: `tf.IndexedSlices` or None for
        # a dense one.
        self.read_gradients: dict[int, list[tf.IndexedSlices | None]] = {}
        # Variables whose lookups are of positions and not of tokens, by `id`.
        self.looked_up_by_position: set[int] = set()
        # Gradients of the parts of gathered variables, as the tape has them, by the variable's
        # `id`: whoever changes a gradient does not hand on one of these.
        self.part_gradients: dict[int, list[tf.Tensor]] = {}
        # Variables whose gradient each rank of these axes holds only a part of, by `id`.
        self.partial_gradients: dict[int, tuple[str, ...]] = {}
        # How many rows of the batch are this rank's own, int32 scalar; None where every rank has
        # as many. See `llmos_tf.collectives.batch`.
        self.rows: tf.Tensor | None = None
        # Statistics that each rank has updated by its own rows, to be averaged at the end, by `id`.
        self.statistics: dict[int, Any] = {}
        # The trace of a model of which a pipeline's parts are cut, while there is one.
        self.trace: Any = None
        # What the programs of all stages share, in the order in which they come to it.
        self.shared: list[Any] = []
        # The op by which something was last required.
        self.required: tf.Operation | None = None
        self._num_shared = 0
        # Whether layers are compiled by XLA, and the block that is being traced; see
        # `llmos_tf.graph.outlined_function`.
        self.compiles_blocks = False
        self.num_compiled_blocks = 0
        self.block: Any = None
        # Which layers of the model that is being called are computed again in the backward pass;
        # None outside of a call. See `strategies.layer_stack.rematerialise`.
        self.recomputation: Any = None
        # When the weights of the model's blocks are gathered, and that of the block that is being
        # called; see `strategies.layer_stack.fsdp_prefetch`.
        self.block_gathers: Any = None
        self.gathering: Any = None
        # What is to be done at the end of the trace, with the place of each op by its name.
        self.endings: list[Callable[[dict[str, int]], None]] = []
        # What a call of a model has gathered and may use again, as a table for tokens and logits;
        # None outside of one.
        self.reads: dict[Any, tf.Tensor] | None = None
        # Whether an embedding is being called, which reads its table to look up rows.
        self.looks_up = False
        # What was read for a block that could not be one, by the graph's `id` and the block's key.
        self.spare_reads: dict[Any, tf.Tensor] = {}
        self._coordinate = coordinate
        self._graph = tf.compat.v1.get_default_graph()
        self._cache: dict[Any, tf.Tensor | None] = {}
        self._axes_of_keys: dict[Any, frozenset[str]] = {}

    @property
    def replica_id_in_sync_group(self) -> tf.Tensor:
        """Index of this rank's rows of the batch, int32 scalar, as `tf.distribute` counts."""
        return self.axis_index(("data", "fsdp"))

    def own_coordinate(self) -> tf.Tensor:
        """Returns this rank's position on each axis, int32 ``[axes]``."""
        return self._coordinate

    def axis_index(self, axes: str | Iterable[str]) -> tf.Tensor:
        """Returns the position of this rank in its group along `axes`.

        Args:
            axes: an axis name or several; the first in mesh order varies slowest.

        Returns:
            int32 scalar, a tensor of the program.
        """
        names = self.mesh.canonical_axes(axes)
        strides, stride = [0] * len(AXES), 1
        for axis in reversed(names):
            strides[AXES.index(axis)] = stride
            stride *= self.mesh.axis_size(axis)
        return self._dot(0, strides)

    @property
    def ordering_token(self) -> tf.Tensor:
        """The resource that orders the collectives which are made now."""
        return self.gradient_token if self.reduces_gradients else self.token

    def group_key(self, axes: tuple[str, ...]) -> tf.Tensor:
        """Returns the collective key of this rank's group along `axes`, int32 scalar.

        Collectives of one group run in one order on all its ranks. So those that sum gradients,
        which are not in the order of the others, have another key.

        Args:
            axes: canonical axis names.

        Returns:
            The key as a tensor of the program.
        """
        key = self._dot(*self.keys.group_strides(axes, self.reduces_gradients))
        self._axes_of_keys[key.ref()] = frozenset(a for a in axes if self.mesh.axis_size(a) > 1)
        return key

    def axes_of_group(self, key: tf.Tensor) -> frozenset[str]:
        """Returns the axes of the group that a key names.

        Args:
            key: as `group_key` has returned it.

        Returns:
            Those of more than one rank; none for any other tensor.
        """
        return self._axes_of_keys.get(key.ref(), frozenset())

    def instance_key(self, axes: tuple[str, ...]) -> int | tf.Tensor:
        """Returns a key for one more collective op, below `MAX_INSTANCES`.

        Args:
            axes: along which it communicates, canonical.

        Returns:
            An integer; int32 scalar in a block that may run again, where it is another one.
        """
        kind = "pipe" if "pipe" in axes else self.stage
        levels = 0 if self.block is None else self.block.levels
        key = self.keys.next_instance(kind if self.trace is None else "trace", 2**levels)
        return key + self.block.key_offset() if levels else key

    def member_places(self, axes: tuple[str, ...]) -> tf.Tensor | None:
        """Returns where TensorFlow has the members of this rank's group along `axes`.

        It orders a group's members by the names of their devices. Which order the mesh has is the
        user's choice: devices that share a fast link may be apart in name.

        Args:
            axes: canonical axis names.

        Returns:
            int32 ``[group]``, for each member in mesh order its place; None where the orders agree.
        """
        key = ("places", *axes)
        if key not in self._cache:
            table = _places(self.mesh, axes)
            if (table == range(table.shape[1])).all():
                self._cache[key] = None
            else:
                rank = self.axis_index(AXES)
                with self._graph.as_default(), tf.control_dependencies(None):
                    self._cache[key] = tf.gather(tf.constant(table), rank)
        return self._cache[key]

    def once(self, key: Any, compute: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Returns what `compute` returns, computed once per program, in its outermost graph.

        The bodies of loops and conditions may capture from that graph, but not from each other.

        Args:
            key: names the result.
            compute: makes it of the program's inputs.

        Returns:
            The tensor.
        """
        if key not in self._cache:
            # Outside of all blocks too.
            outermost = self.having(block=None)
            with outermost, self._graph.as_default(), tf.control_dependencies(None):
                self._cache[key] = compute()
        return self._cache[key]

    def once_in_call(self, key: Any, compute: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Returns what `compute` returns, computed once in the call of a model that has `reads`.

        Args:
            key: names the result.
            compute: makes it.

        Returns:
            The tensor; a new one outside of such a call, or in a block, a loop or a condition, from
            which no tensor comes out.
        """
        if self.reads is None or self.block is not None:
            return compute()
        # Not that of the program: a model may be called in a loop as a whole.
        key = (key, id(tf.compat.v1.get_default_graph()))
        if key not in self.reads:
            self.reads[key] = compute()
        return self.reads[key]

    def require(self, tensors: Iterable[tf.Tensor]) -> None:
        """Has tensors computed that nothing else depends on, such as what tells that it was sent.

        What communicates later waits for it, and it for what has communicated before.

        Args:
            tensors: numbers of the program's outermost graph, none below 0.
        """
        # TensorFlow leaves nothing out that changes a resource. The values are used, as an op that
        # is only waited for may be left out.
        zeros = [tf.cast(x < 0, tf.float32) for x in tensors]
        self.required = tf.raw_ops.AssignAddVariableOp(
            resource=self.token, value=tf.add_n([tf.zeros([]), *zeros])
        )

    def zero_after_required(self) -> tf.Tensor:
        """Returns 0 as soon as what was required is there, int32 scalar."""
        value = tf.raw_ops.ReadVariableOp(resource=self.token, dtype=tf.float32)
        return tf.cast(value, tf.int32)

    def share(self, make: Callable[[], Any]) -> Any:
        """Returns what the program of each stage asks for at the same place.

        Args:
            make: makes it, for the program that is traced first.

        Returns:
            The same object in all of them.
        """
        if self._num_shared == len(self.shared):
            self.shared.append(make())
        self._num_shared += 1
        return self.shared[self._num_shared - 1]

    def _dot(self, base: int, strides: list[int]) -> tf.Tensor:
        """base + coordinate · strides, once per program, in its outermost graph."""

        def compute():
            value = tf.constant(base, tf.int32)
            for position, stride in enumerate(strides):
                if stride and self.mesh.axis_size(AXES[position]) > 1:
                    value += self._coordinate[position] * stride
            return value

        return self.once((base, *strides), compute)

    def is_outermost(self) -> bool:
        """Returns whether ops are being made in the program's own graph, and in no block."""
        return self.block is None and tf.compat.v1.get_default_graph() is self._graph

    def end(self) -> None:
        """Does what was left for the end of the trace, when all ops are made."""
        if self.endings:
            places = {op.name: i for i, op in enumerate(self._graph.get_operations())}
            for ending in self.endings:
                ending(places)
            self.endings.clear()

    @contextmanager
    def having(self, **state: Any) -> Iterator[None]:
        """Sets attributes of the program while the context is entered.

        Args:
            **state: attribute names and values, such as ``sequence_parallel=False`` for decoding.
        """
        before = {name: getattr(self, name) for name in state}
        try:
            self.__dict__.update(state)
            yield
        finally:
            self.__dict__.update(before)

    def all_gather(self, value: Any, axis: int, options: Any = None) -> Any:
        """Concatenates the replicas' values; `tf.distribute.ReplicaContext.all_gather`.

        Args:
            value: nested tensors; the replicas' may differ in the length along `axis`.
            axis: dimension along which to concatenate.
            options: not needed.

        Returns:
            The same structure, the same on every rank.
        """
        del options
        return self.strategy.extended.replica_ctx_all_gather(value, axis)

    def _merge_call(self, merge_fn: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(merge_fn, "__name__", repr(merge_fn))
        raise RuntimeError(
            f"merge_call({name}) was called in a replica. A mesh strategy traces one program for "
            "all devices, so there is no cross-replica code inside it; use "
            "all_reduce and all_gather of tf.distribute.get_replica_context(), or "
            "llmos_tf.collectives, instead."
        )


def _places(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """For each rank, the places of its group's members in the order of their devices' names."""
    table = np.zeros((mesh.size, mesh.axis_size(axes)), np.int32)
    for group in mesh.groups(axes):
        names = [tf.DeviceSpec.from_string(mesh.devices[rank]) for rank in group]
        keys = [(d.job, d.replica, d.task, d.device_type, d.device_index) for d in names]
        table[list(group)] = [sorted(keys).index(key) for key in keys]
    return table


def current_program() -> ReplicaProgram | None:
    """Returns the program that is being traced, or None outside `strategy.run` of a mesh."""
    context = tf.distribute.get_replica_context()
    return context if isinstance(context, ReplicaProgram) else None


class OutsideProgram(RuntimeError):
    """Something that is written for a rank was called where no program of a rank is traced."""


def require_program(what: str) -> ReplicaProgram:
    """Returns the program that is being traced.

    Args:
        what: what the caller was about to do, for the error.

    Returns:
        The program.

    Raises:
        OutsideProgram: nothing is being traced, or a step as for one device.
    """
    program = current_program()
    if program is None:
        raise OutsideProgram(
            f"{what} works inside the program of a device only: call it in a function that "
            "MeshStrategy(...).run(fn) or model.fit under the strategy's scope runs."
        )
    return program
