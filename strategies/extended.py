"""What all mesh strategies share: variables, scope, input, and the words of the project.

Glossary:

- *mesh*: devices in a grid with named *axes* (`llmos_tf.mesh`).
- *rank*: a device's index in the mesh. *Coordinate*: its position on each axis. *Group*: the ranks
  that differ only on some axes.
- *replica*, as `tf.distribute` counts: one part of the batch. There are data × fsdp of them; ranks
  that differ only on other axes get the same rows.
- *program*: a replica function, traced once and called on every rank (`strategies.engine.engine`).
- *layout*: how a variable is cut over the mesh. *Slice*: what a rank computes with. *Part*: what it
  stores.
- *collective*: communication within a group (`llmos_tf.collectives`).
- *microbatch*, *stage*, *schedule*: the units of a pipeline.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import _internal, collectives, devices
from llmos_tf.collectives import batch
from llmos_tf.coordination import Agreement
from llmos_tf.mesh import BATCH_AXES, Mesh
from llmos_tf.options import MeshOptions
from llmos_tf.sharding import LayoutRules, ShardedVariable
from llmos_tf.spmd.collective_keys import CollectiveKeys
from llmos_tf.spmd.program import current_program, require_program
from llmos_tf.strategies.engine import reductions
from llmos_tf.strategies.engine.engine import Engine
from llmos_tf.strategies.engine.input import deal_dataset, split_batch, split_dataset
from llmos_tf.strategies.engine.replica_functions import check_inputs, model_of
from llmos_tf.strategies.engine.variable_creation import make_variable
from llmos_tf.strategies.keras_patches.custom_loops import hook_optimizers
from llmos_tf.strategies.keras_patches.export import hook_export
from llmos_tf.strategies.keras_patches.fit_batch import hook_fit
from llmos_tf.strategies.keras_patches.keras_hub import hook_keras_hub
from llmos_tf.strategies.keras_patches.layer_calls import hook_remat, works_by_blocks
from llmos_tf.strategies.keras_patches.losses_outside import hook_losses
from llmos_tf.strategies.keras_patches.overwritten_variables import hook_overwritten_variables
from llmos_tf.strategies.keras_patches.symbolic_build import hook_build
from llmos_tf.strategies.keras_patches.variable_paths import hook_variable_paths
from llmos_tf.strategies.keras_patches.while_tracing import (
    global_hooks,
    hook_compile,
    replica_hooks,
)
from llmos_tf.strategies.pipeline.keras_steps import (
    hook_steps,
    place_model_of,
    warn_if_not_pipelined,
)
from llmos_tf.strategies.pipeline.placement import place_before_a_step


class MeshExtended(_internal.MirroredExtended):
    """The part of a mesh strategy that TensorFlow calls, `strategy.extended`.

    Args:
        strategy: the strategy it belongs to.
        mesh: a mesh of fully named devices.
        options: what the strategy was given beside its mesh, checked.
    """

    def __init__(self, strategy: tf.distribute.Strategy, mesh: Mesh, options: MeshOptions):
        self.mesh = mesh
        self.options = options
        self.layout_rules = LayoutRules(mesh, options.layout_map)
        self.schedule = options.make_schedule(mesh)
        # The stage that has the last part of a model.
        self.result_stage = 0
        if self.schedule is not None:
            self.result_stage = self.schedule.stage_of_part(self.schedule.num_parts - 1)
        self.local_ranks = tuple(
            rank for rank, device in enumerate(mesh.devices) if devices.is_local(device)
        )
        local = [mesh.devices[rank] for rank in self.local_ranks]
        super().__init__(strategy, local, tf.distribute.ReductionToOneDevice())
        hook_compile()
        hook_losses()
        hook_build()
        hook_export()
        hook_variable_paths()
        hook_overwritten_variables()
        hook_remat()
        hook_keras_hub()
        hook_steps()
        hook_fit()
        hook_optimizers()
        self.communication = _communication(local)
        # The device on which optimizer state and weights lie that are offloaded, or None.
        host = devices.host(options.host_device) if options.offload else None
        self.host_of_state = host if "optimizer" in options.offload else None
        self.host_of_parameters = host if "parameters" in options.offload else None
        # Whether collectives may be edges of the graph; see `strategies.engine.graph_edges`.
        self.shares_memory = _shares_memory(mesh, local)
        self.collective_keys = CollectiveKeys(mesh)
        self.engine = Engine(self)
        # Of the processes that hold the ranks; None where they do not check each other.
        self.agreement: Agreement | None = None
        # Whether other processes hold some of the ranks.
        self.spans_processes = len(self.local_ranks) < mesh.size
        # The parts of the batch that this process works on.
        self.local_batch_parts = self._batch_parts_of(self.local_ranks)
        # Positions among the local ranks, for each stage of which this process has some.
        self.positions_by_stage = tuple(
            positions
            for stage in range(mesh.axis_size("pipe"))
            if (positions := [i for i in range(len(local)) if self.stage_of_position(i) == stage])
        )
        # Positions of one rank for each part of the batch.
        self.batch_representatives = tuple(map(self._representative, self.local_batch_parts))
        # Weights of models that were not cut into stages yet.
        self.waiting: list[ShardedVariable] = []
        # How many pipelines were traced so far.
        self.num_pipelines = 0
        # Resources of each rank, by which it orders its collectives; those of gradients apart.
        zeros = [np.zeros([], np.float32)] * len(self._devices)
        self.tokens = self.make_rank_state("collective_order", zeros)
        self.gradient_tokens = self.make_rank_state("gradient_order", zeros)

    def make_rank_state(self, name: str, values: Sequence[np.ndarray]) -> Any:
        """Makes what each local rank keeps for itself, also while a program is traced.

        Args:
            name: of the variable.
            values: initial value of each local rank.

        Returns:
            A distributed variable; each rank reads and assigns its own component.
        """
        components = []
        for device, value in zip(self._devices, values, strict=True):
            with tf.init_scope(), tf.device(device):
                # Not `tf.Variable`, which the scope would make a variable of the mesh.
                components.append(_internal.ResourceVariable(value, trainable=False, name=name))
        return _internal.MirroredVariable(
            self._container_strategy(), components, tf.VariableAggregation.NONE
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
        return self.local_batch_parts.index(self.mesh.index_along(rank, BATCH_AXES))

    def stage_of_position(self, position: int) -> int:
        """Returns the place on the axis `pipe` of a local rank.

        Args:
            position: of the rank, among the local ones.

        Returns:
            The stage.
        """
        return self.mesh.index_along(self.local_ranks[position], "pipe")

    def _representative(self, part: int) -> int:
        """Position of a local rank that has the results of a part of the batch."""
        positions = [
            position
            for position, rank in enumerate(self.local_ranks)
            if self.mesh.index_along(rank, BATCH_AXES) == part
        ]
        at_end = [i for i in positions if self.stage_of_position(i) == self.result_stage]
        return (at_end or positions)[0]

    def _batch_parts_of(self, ranks: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({self.mesh.index_along(rank, BATCH_AXES) for rank in ranks}))

    def in_one_process(self, axes: Iterable[str]) -> bool:
        """Returns whether no group along `axes` has ranks of two processes.

        Args:
            axes: axis names.

        Returns:
            True where a process that has one rank of a group has them all.
        """
        if not self.spans_processes:
            return True
        process = [devices.process_of(device) for device in self.mesh.devices]
        groups = self.mesh.groups(axes)
        return all(len({process[rank] for rank in group}) == 1 for group in groups)

    # --- running ---------------------------------------------------------------------------------

    def _call_for_each_replica(self, fn, args, kwargs):
        self.layout_rules.check_all_used()
        if _internal.is_keras_step(fn):
            args = split_batch(args, self._container_strategy())
        check_inputs(self, fn, args)
        before = self.engine.num_traces, self.num_pipelines
        if self.schedule is not None:
            place_model_of(self, fn, args)
        if self.spans_processes and _internal.is_keras_predict_step(fn):
            # Keras puts together what this process has.
            return reductions.run_gathering(self, fn, args, kwargs)
        # Of rows Keras puts together what `predict` returns, and no logs.
        are_logs = _internal.is_keras_step(fn) and not _internal.is_keras_predict_step(fn)
        results = self.engine.run(fn, args, kwargs, all_rows=are_logs)
        if self.schedule is not None:
            warn_if_not_pipelined(self, fn, *before)
        return results

    def place(self, model: Any) -> None:
        """Decides which stage of a pipeline holds which weights of a model, if no step has yet.

        Args:
            model: a built Keras model.

        Raises:
            ValueError: the inputs of the model are not known, or it cannot be cut.
        """  # noqa: DOC502
        if self.schedule is not None:
            place_before_a_step(self, model)

    def replica_hooks(self) -> AbstractContextManager:
        """Returns the context that is entered while a program is traced."""
        return replica_hooks()

    def global_hooks(self) -> AbstractContextManager:
        """Returns the context that is entered while a step is traced as for one device."""
        return global_hooks()

    def partitions(self, fn: Any) -> bool:
        """Returns whether a replica function is traced as for one device and partitioned.

        Args:
            fn: the function.

        Returns:
            True for steps of a mesh that splits nothing but rows; not yet where blocks of the model
            are compiled, computed again, or gathered again.
        """
        splits_rows_only = self.mesh.batch_ways == self.mesh.size > 1
        if not splits_rows_only or not batch.weighs_rows(fn):
            return False
        options = self.options
        if options.reshard_after_forward or options.rematerialise != "none":
            return False
        model = model_of(fn)
        return model is None or not works_by_blocks(model)

    def _use_merge_call(self) -> bool:
        # There is no cross-replica code inside a program; and outside one, an optimizer that is
        # given gradients has to update by itself, as no replica is there to merge.
        return False

    def _get_cross_device_ops(self, value):
        # What the base class would take instead where nothing is merged.
        del value
        return self._cross_device_ops

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        del options
        require_program("ReplicaContext.all_reduce")
        mean = reduce_op == tf.distribute.ReduceOp.MEAN

        def one(x):
            x = batch.counted(tf.convert_to_tensor(x))
            total = collectives.all_reduce(x, BATCH_AXES)
            if not mean:
                return total
            # Replicas without rows do not count.
            count = batch.counted(tf.ones([], x.dtype))
            return total / collectives.all_reduce(count, BATCH_AXES)

        return tf.nest.map_structure(one, value)

    def _replica_ctx_update(self, var, fn, args, kwargs, group):
        del group
        if any(isinstance(arg, tf.IndexedSlices) for arg in args):
            # Rows of the whole variable: it is updated as a whole.
            with current_program().having(update_parts=False):
                return fn(var, *args, **kwargs)
        return fn(var, *args, **kwargs)

    def replica_ctx_all_gather(self, value: Any, axis: int) -> Any:
        """Concatenates the replicas' values in a program.

        Args:
            value: nested tensors.
            axis: dimension along which to concatenate.

        Returns:
            The same structure.
        """
        return tf.nest.map_structure(lambda x: reductions.all_gather(x, axis), value)

    def _reduce_to(self, reduce_op, value, destinations, options):
        del destinations, options
        mean = reduce_op == tf.distribute.ReduceOp.MEAN

        def one(x):
            parts = reductions.values_of(x)
            if not _is_number(parts[0].dtype):
                # Keras builds models on a mean of the batch, masks and strings with the rest.
                return parts[0]
            if self.spans_processes:
                return reductions.reduce_everywhere(self, x, mean)
            if not isinstance(x, tf.distribute.DistributedValues):
                # One value for all replicas: its mean is itself.
                return x if mean else x * self._num_replicas_in_sync
            total = tf.add_n(reductions.aligned(parts))
            if not mean:
                return total
            # Where an uneven batch gives some replicas more rows, over those that have a row.
            count = tf.add_n(reductions.aligned([tf.ones_like(part) for part in parts]))
            return reductions.mean_of_parts(total, count)

        return tf.nest.map_structure(one, value)

    def _batch_reduce_to(self, reduce_op, value_destination_pairs, options):
        return [self._reduce_to(reduce_op, v, d, options) for v, d in value_destination_pairs]

    def _gather_to_implementation(self, value, destinations, axis, options):
        if self.spans_processes:
            return reductions.gather_everywhere(self, value, axis)
        return super()._gather_to_implementation(value, destinations, axis, options)

    def _update(self, var, fn, args, kwargs, group):
        # Outside a program a variable reads and takes full values, so `fn` runs once on the whole
        # instead of once for each component.
        result = fn(var, *args, **kwargs)
        return tf.group(result) if group and isinstance(result, tf.Operation) else result

    # --- input -----------------------------------------------------------------------------------

    def _experimental_distribute_dataset(self, dataset, options):
        del options
        return split_dataset(dataset, self.mesh.batch_ways, self.local_batch_parts)

    def _distribute_datasets_from_function(self, dataset_fn, options):
        del options
        # One pipeline for each set of parts: processes that differ only on other axes than those
        # of the batch get the same rows.
        ranks: dict[tuple, list[int]] = {}
        for rank, device in enumerate(self.mesh.devices):
            ranks.setdefault(devices.process_of(device), []).append(rank)
        pipelines = sorted({self._batch_parts_of(members) for members in ranks.values()})
        context = tf.distribute.InputContext(
            num_input_pipelines=len(pipelines),
            input_pipeline_id=pipelines.index(self.local_batch_parts),
            num_replicas_in_sync=self._num_replicas_in_sync,
        )
        ways = len(self.local_batch_parts)
        return deal_dataset(dataset_fn(context), ways, is_split=self.mesh.batch_ways > 1)

    def _experimental_distribute_values_from_function(self, value_fn):
        context = tf.distribute.experimental.ValueContext
        values = [value_fn(context(i, self._num_replicas_in_sync)) for i in self.local_batch_parts]
        return _internal.regroup(tuple(values), always_wrap=True)

    def _create_variable(self, next_creator, **kwargs):
        return make_variable(self, next_creator, kwargs)


def _is_number(dtype: tf.DType) -> bool:
    return dtype.is_floating or dtype.is_integer or dtype.is_complex


def _shares_memory(mesh: Mesh, local: list[str]) -> bool:
    """Whether all devices are CPU devices of this process, and all communicate along `data`."""
    kinds = {tf.DeviceSpec.from_string(device).device_type for device in local}
    is_alone = len(local) == mesh.size == mesh.axis_size("data") > 1
    # A program that knows the order in which the op has its members lays tensors in that order.
    indices = [tf.DeviceSpec.from_string(device).device_index for device in local]
    return kinds == {"CPU"} and is_alone and indices == sorted(indices)


def _communication(local: list[str]) -> str:
    kinds = {tf.DeviceSpec.from_string(device).device_type for device in local}
    physical = len(tf.config.list_physical_devices("GPU"))
    # NCCL needs one physical GPU for each rank; virtual GPUs and CPU devices use rings.
    if kinds == {"GPU"} and physical >= len(local):
        return "nccl"
    return "ring"
