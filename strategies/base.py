"""What all mesh strategies share: variables, scope, input, and the words of the project.

Glossary:

- *mesh*: devices in a grid with named *axes* (`llmos_tf.mesh`).
- *rank*: a device's index in the mesh. *Coordinate*: its position on each axis. *Group*: the ranks
  that differ only on some axes.
- *replica*, as `tf.distribute` counts: one part of the batch. There are data × fsdp of them; ranks
  that differ only on other axes get the same rows.
- *program*: a replica function, traced once and called on every rank (`strategies.engine`).
- *layout*: how a variable is cut over the mesh. *Slice*: what a rank computes with. *Part*: what it
  stores.
- *collective*: communication within a group (`llmos_tf.collectives`).
- *microbatch*, *stage*, *schedule*: the units of a pipeline.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager

import tensorflow as tf

from llmos_tf import _internal, collectives, devices
from llmos_tf.mesh import BATCH_AXES, Mesh
from llmos_tf.program import CollectiveKeys, current_program, require_program
from llmos_tf.sharding import Layout, LayoutRules, MetricVariable, SeedVariable, ShardedVariable
from llmos_tf.strategies.engine import Engine
from llmos_tf.strategies.input import MeshDataset
from llmos_tf.strategies.keras_hooks import replica_hooks


class MeshExtended(_internal.MirroredExtended):
    """The part of a mesh strategy that TensorFlow calls, `strategy.extended`.

    Args:
        strategy: the strategy it belongs to.
        mesh: a mesh of fully named devices.
        zero_stage: 0 to 3; 1 and 2 cut optimizer state along `data`.
        layout_map: the user's layout rules, or None for the model's own.
        sequence_parallel: whether activations between blocks are split over `tensor`.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        mesh: Mesh,
        zero_stage: int,
        layout_map: Mapping | None,
        sequence_parallel: bool,
    ):
        self.mesh = mesh
        self.zero_stage = zero_stage
        self.sequence_parallel = sequence_parallel
        self.layout_rules = LayoutRules(mesh, layout_map)
        self.local_ranks = tuple(
            rank for rank, device in enumerate(mesh.devices) if devices.is_local(device)
        )
        local = [mesh.devices[rank] for rank in self.local_ranks]
        super().__init__(strategy, local, tf.distribute.ReductionToOneDevice())
        self.communication = _communication(local)
        self.collective_keys = CollectiveKeys(mesh)
        self.engine = Engine(self)
        batch_parts = sorted({mesh.index_along(rank, BATCH_AXES) for rank in self.local_ranks})
        self._batch_parts = batch_parts
        # Positions, among the local ranks, of one rank for each part of the batch.
        self.batch_representatives = tuple(
            next(
                position
                for position, rank in enumerate(self.local_ranks)
                if mesh.index_along(rank, BATCH_AXES) == part
            )
            for part in batch_parts
        )
        self.tokens = self._make_tokens()

    def _make_tokens(self) -> _internal.MirroredVariable:
        """One resource for each rank, by which it orders its collectives."""
        tokens = []
        for device in self._devices:
            with tf.device(device), tf.init_scope():
                tokens.append(tf.Variable(0.0, trainable=False, name="collective_order"))
        return _internal.MirroredVariable(
            self._container_strategy(), tokens, tf.VariableAggregation.NONE
        )

    def container_strategy(self) -> tf.distribute.Strategy:
        """Returns the strategy this belongs to."""
        return self._container_strategy()

    @property
    def _num_replicas_in_sync(self) -> int:
        return self.mesh.batch_ways

    def local_batch_index(self, rank: int) -> int:
        """Returns which of this process's parts of the batch `rank` works on.

        Args:
            rank: a local rank.

        Returns:
            Index into the values of a `PerReplica`.
        """
        return self._batch_parts.index(self.mesh.index_along(rank, BATCH_AXES))

    # --- running ---------------------------------------------------------------------------------

    def _call_for_each_replica(self, fn, args, kwargs):
        self.layout_rules.check_all_used()
        return self.engine.run(fn, args, kwargs)

    def replica_hooks(self) -> AbstractContextManager:
        """Returns the context that is entered while a program is traced."""
        return replica_hooks()

    def _use_merge_call(self) -> bool:
        # False in a program, which has no cross-replica code inside; true outside, where reductions
        # of results are plain sums.
        return current_program() is None

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        del options
        require_program("ReplicaContext.all_reduce")
        mean = reduce_op == tf.distribute.ReduceOp.MEAN

        def one(x):
            y = collectives.all_reduce(tf.convert_to_tensor(x), BATCH_AXES)
            return y / tf.cast(self._num_replicas_in_sync, y.dtype) if mean else y

        return tf.nest.map_structure(one, value)

    def _replica_ctx_update(self, var, fn, args, kwargs, group):
        del group
        if any(isinstance(arg, tf.IndexedSlices) for arg in args):
            # Rows of the whole variable: it is updated as a whole.
            with current_program().having(update_parts=False):
                return fn(var, *args, **kwargs)
        return fn(var, *args, **kwargs)

    def _reduce_to(self, reduce_op, value, destinations, options):
        del destinations, options
        mean = reduce_op == tf.distribute.ReduceOp.MEAN

        def one(x):
            parts = x.values if isinstance(x, tf.distribute.DistributedValues) else (x,)
            if len(parts) == 1:
                # One value for all replicas: its mean is itself.
                return parts[0] if mean else parts[0] * self._num_replicas_in_sync
            tensors = [tf.convert_to_tensor(part) for part in parts]
            return _mean_of_parts(tensors) if mean else tf.add_n(_aligned(tensors))

        return tf.nest.map_structure(one, value)

    def _update(self, var, fn, args, kwargs, group):
        # Outside a program a variable reads and takes full values, so `fn` runs once on the whole
        # instead of once for each component.
        result = fn(var, *args, **kwargs)
        return tf.group(result) if group and isinstance(result, tf.Operation) else result

    # --- input -----------------------------------------------------------------------------------

    def _experimental_distribute_dataset(self, dataset, options):
        del options
        return MeshDataset(dataset, self)

    # --- variables -------------------------------------------------------------------------------

    def _create_variable(self, next_creator, **kwargs):
        beside = kwargs.pop("colocate_with", None)
        name = kwargs.get("name") or "variable"
        path = "/".join(filter(None, (_internal.current_path(), name)))
        if kwargs.get("synchronization") == tf.VariableSynchronization.ON_READ:
            return self._create_metric_variable(next_creator, name, kwargs)
        initial = _initial_value(kwargs)
        shape = tuple(initial.shape)
        layout, update_layout = self._layouts_for(path, shape, kwargs, beside)
        kind = SeedVariable if name == "seed_generator_state" else ShardedVariable
        components = self._create_components(next_creator, name, kwargs, initial, layout)
        variable = kind(
            self._container_strategy(),
            components,
            kwargs.get("aggregation") or tf.VariableAggregation.NONE,
            layout,
            update_layout,
            shape,
            path,
        )
        if kind is SeedVariable:
            variable.assign(initial)
        return variable

    def _layouts_for(self, path, shape, kwargs, beside) -> tuple[Layout, Layout]:
        """Layout in storage and layout for the optimizer."""
        if isinstance(beside, ShardedVariable) and tuple(beside.shape) == shape:
            # Optimizer state is created beside its variable and cut as the optimizer sees it.
            return beside.update_layout, beside.update_layout
        trainable = kwargs.get("trainable") is not False
        dtype = tf.as_dtype(kwargs.get("dtype") or tf.float32)
        layout = self.layout_rules.find(path, shape, trainable)
        # A scalar is not worth cutting, and an optimizer's own counters look like weights.
        if not (trainable and dtype.is_floating and shape):
            return layout, layout
        flat = ("fsdp",) if "fsdp" not in layout.dims else ()
        layout = dataclasses.replace(layout, flat=flat).effective(self.mesh)
        more = ("data",) if self.zero_stage in (1, 2) else ()
        update_layout = dataclasses.replace(layout, flat=layout.flat + more)
        return layout, update_layout.effective(self.mesh)

    def _create_components(self, next_creator, name, kwargs, initial, layout):
        kwargs = {**kwargs, "shape": None, "aggregation": tf.VariableAggregation.NONE}
        kwargs["synchronization"] = tf.VariableSynchronization.AUTO
        components = []
        for rank, device in zip(self.local_ranks, self._devices, strict=True):
            with tf.init_scope(), _internal.stop_recording():
                with tf.device("CPU:0"):
                    part = layout.part_of(initial, self.mesh, rank)
                with tf.device(device):
                    kwargs["initial_value"] = part
                    kwargs["name"] = name if rank == 0 else f"{name}/rank_{rank}/"
                    components.append(next_creator(**kwargs))
        return components

    def _create_metric_variable(self, next_creator, name, kwargs):
        initial = _initial_value(kwargs)
        layout = Layout((None,) * initial.shape.rank)
        components = self._create_components(next_creator, name, kwargs, initial, layout)
        return MetricVariable(self._container_strategy(), components, kwargs["aggregation"])


def _mean_of_parts(parts: list[tf.Tensor]) -> tf.Tensor:
    """Mean over replicas; where an uneven batch gives some more rows, over those that have a row.

    Whole numbers stay whole: Keras builds models on the mean of a batch of tokens.
    """
    total = tf.add_n(_aligned(parts))
    count = tf.add_n(_aligned([tf.ones_like(part) for part in parts]))
    return total // count if total.dtype.is_integer else total / count


def _aligned(parts: list[tf.Tensor]) -> list[tf.Tensor]:
    """The parts, filled up with rows of zeros to the longest."""
    if len({tuple(part.shape.as_list()) for part in parts}) == 1:
        return parts
    longest = tf.reduce_max([tf.shape(part)[0] for part in parts])
    return [
        tf.pad(part, [[0, longest - tf.shape(part)[0]], *[[0, 0]] * (part.shape.rank - 1)])
        for part in parts
    ]


def _initial_value(kwargs: dict) -> tf.Tensor:
    """The full initial value, computed once, on the host: what one device would start with."""
    initial = kwargs["initial_value"]
    with tf.init_scope(), _internal.stop_recording(), tf.device("CPU:0"):
        value = initial() if callable(initial) else initial
        return tf.convert_to_tensor(value, dtype=kwargs.get("dtype"))


def _communication(local: list[str]) -> str:
    kinds = {tf.DeviceSpec.from_string(device).device_type for device in local}
    physical = len(tf.config.list_physical_devices("GPU"))
    # NCCL needs one physical GPU for each rank; virtual GPUs and CPU devices use rings.
    if kinds == {"GPU"} and physical >= len(local):
        return "nccl"
    return "ring"
