"""Trace once, call per device.

`MirroredStrategy` runs a replica function in one thread for each device and traces it once for
each. Here it is traced once, and one call of the traced function is placed on every device, with
that device's variable handles, coordinate and rows of the batch as inputs. See docs/adr/0001.
"""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal, collectives
from llmos_tf.collectives import batch
from llmos_tf.graph.errors import awaited_calls, trace_for_devices
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.sharding.assignment import average_statistics, check_owner
from llmos_tf.spmd.program import HOW_TO_TRAIN, OutsideProgram, ReplicaProgram
from llmos_tf.strategies.engine.global_batch import GlobalBatch
from llmos_tf.strategies.engine.global_step import GlobalStep
from llmos_tf.strategies.engine.graph_edges import Phases
from llmos_tf.strategies.engine.replica_functions import model_of
from llmos_tf.strategies.engine.rows import lend_rows
from llmos_tf.strategies.engine.workers import StepCounter, require_same_programs

# Functions that were called eagerly, for each strategy. A function that is made anew for each call,
# as `strategy.reduce(..., axis=0)` does, must not be kept, with all that it refers to, for ever.
MAX_EAGER_FUNCTIONS = 64


class Engine:
    """Runs replica functions on the local ranks of a mesh.

    Args:
        extended: the strategy's `MeshExtended`, which owns mesh, devices, keys and tokens.
    """

    def __init__(self, extended: Any):
        self._extended = extended
        self._eager_functions: dict[Any, tf.types.experimental.PolymorphicFunction] = {}
        self.num_traces = 0
        # What steps of models gather, by the name of the step.
        self.gathered: weakref.WeakKeyDictionary[Any, dict[str, list[dict]]] = (
            weakref.WeakKeyDictionary()
        )
        # Where other processes hold some ranks, counts calls for `coordination.watch`.
        self.steps: StepCounter | None = None

    def count_steps(self) -> StepCounter:
        """Returns what counts the calls of programs from now on."""
        self.steps = StepCounter()
        return self.steps

    def run(self, fn: Callable, args: tuple, kwargs: dict, all_rows: bool = False) -> Any:
        """Runs `fn` on every local rank.

        Args:
            fn: the replica function.
            args: its arguments; a `PerReplica` gives each rank its rows of the batch.
            kwargs: its keyword arguments.
            all_rows: of a step that is partitioned, whether results that count rows are those of
                the whole batch.

        Returns:
            Results, one for each part of the batch, as `tf.distribute` returns them.
        """
        if tf.inside_function():
            return self._run_in_graph(fn, args, kwargs, all_rows)
        # Eagerly, one device's collective would wait for devices that were not yet called.
        key = getattr(fn, "__wrapped__", fn)
        function = self._eager_functions.pop(key, None)
        if function is None:
            function = tf.function(
                lambda args, kwargs: self._run_in_graph(fn, args, kwargs, all_rows),
                autograph=False,
            )
        # Last in, so that the first is the one that was not used for longest.
        self._eager_functions[key] = function
        if len(self._eager_functions) > MAX_EAGER_FUNCTIONS:
            del self._eager_functions[next(iter(self._eager_functions))]
        return function(args, kwargs)

    def _run_in_graph(self, fn: Callable, args: tuple, kwargs: dict, all_rows: bool) -> Any:
        extended = self._extended
        per_rank = [
            _internal.select_replica(extended.local_batch_index(rank), (args, kwargs))
            for rank in extended.local_ranks
        ]
        if extended.partitions(fn):
            given = GlobalBatch(per_rank, extended.batch_representatives, extended.mesh.batch_ways)
            # A step that calls collectives is written for a rank.
            with contextlib.suppress(OutsideProgram):
                step = GlobalStep(extended.container_strategy(), fn, given, all_rows)
                self._note_gathered(fn, step)
                return self._run_partitioned(step, given)
        rows = None
        if batch.weighs_rows(fn):
            rows, per_rank = lend_rows(extended.mesh, len(extended.local_batch_parts), per_rank)
        lends = rows is not None
        if rows is None:
            rows = [tf.constant(0)] * len(per_rank)
        flat = [tf.nest.flatten(value, expand_composites=True) for value in per_rank]
        is_tensor = [tf.is_tensor(value) for value in flat[0]]
        inputs = [[v for v, t in zip(values, is_tensor, strict=True) if t] for values in flat]
        specs = [_common_spec(values) for values in zip(*inputs, strict=True)]
        values = [[own, *tensors] for own, tensors in zip(rows, inputs, strict=True)]
        programs: dict[int, Any] = {}
        shared: list[Any] = []
        for positions in extended.collective_keys.each_stage(extended.positions_by_stage):
            stage = extended.stage_of_position(positions[0])
            programs[stage] = self._trace(
                fn, positions[0], per_rank[0], is_tensor, lends, specs, shared
            )
        return self._results(programs, values)

    def _note_gathered(self, fn: Callable, step: GlobalStep) -> None:
        model = model_of(fn)
        if model is not None:
            self.gathered.setdefault(model, {})[_internal.name_of_step(fn)] = step.gathered

    def _run_partitioned(self, step: GlobalStep, batch: GlobalBatch) -> Any:
        """Runs a step that was traced as for one device; see `strategies.engine.global_step`."""
        extended = self._extended
        self.num_traces += 1
        own = batch.num_rows
        representatives = [own[i] for i in extended.batch_representatives]
        total = tf.add_n(representatives)

        def program(coordinate, rows, *tensors):
            replica = self._program(coordinate, 0)
            # What is gathered is padded to one shape.
            with replica, replica.having(shapes_agree=True):
                counts = (rows[0], rows[1])
                if batch.static_rows is not None:
                    counts = (batch.rows_of_rank, batch.static_rows)
                elif extended.spans_processes:
                    counts = (rows[0], collectives.all_reduce(rows[0], BATCH_AXES))
                result = step.emit(replica, counts, tensors)
                replica.end()
                return result

        rows_spec = tf.TensorSpec([2], tf.int32)
        traced = self._concrete(program, rows_spec, batch.rank_specs)
        _check_not_shared(traced)
        values = [
            [tf.stack([mine, total]), *tensors]
            for mine, tensors in zip(own, batch.tensors, strict=True)
        ]
        return self._results({0: traced}, values)

    def _results(self, programs: dict[int, Any], values: list[list[tf.Tensor]]) -> Any:
        """Calls the programs, by stage, on all local ranks; returns what `strategy.run` does."""
        extended = self._extended
        if extended.agreement is not None:
            require_same_programs(extended.agreement, programs)
        counting = contextlib.nullcontext() if self.steps is None else self.steps.counting()
        waiting = awaited_calls(extended.worker_devices, programs.values())
        with counting, waiting as begun:
            coordinates = self._coordinates(begun)
            values = [[where, *mine] for where, mine in zip(coordinates, values, strict=True)]
            results = self._call_all(programs, values)
        first = tuple(results[i] for i in extended.batch_representatives)
        return _internal.regroup(
            tf.nest.map_structure(_without_gradient, first, expand_composites=True)
        )

    def _trace(
        self,
        fn: Callable,
        position: int,
        arguments: Any,
        is_tensor: list[bool],
        lends: bool,
        specs: list[tf.TensorSpec],
        shared: list[Any],
    ) -> Any:
        """Traces the program of the stage of a local rank, as a concrete function.

        Args:
            fn: the replica function.
            position: of the rank among the local ones.
            arguments: (arguments, keyword arguments) of one rank.
            is_tensor: which of their flat values are inputs.
            lends: whether ranks may have been lent a row.
            specs: of the inputs.
            shared: what the programs of the other stages have left for this one.

        Returns:
            A function of a rank's coordinate, its number of rows, and its inputs.
        """
        extended, programs = self._extended, []
        flat = tf.nest.flatten(arguments, expand_composites=True)

        def program(coordinate, own_rows, *tensors):
            remaining = iter(tensors)
            values = [next(remaining) if t else v for v, t in zip(flat, is_tensor, strict=True)]
            rank_args, rank_kwargs = tf.nest.pack_sequence_as(
                arguments, values, expand_composites=True
            )
            self.num_traces += 1
            replica = self._program(coordinate, position)
            programs.append(replica)
            replica.rows = own_rows if lends else None
            replica.shared = shared
            with replica, extended.replica_hooks():
                result = fn(*rank_args, **rank_kwargs)
                average_statistics(replica)
                replica.end()
                return tf.nest.map_structure(_own_rows, result)

        concrete = self._concrete(program, tf.TensorSpec([], tf.int32), specs)
        if programs[-1].communicates:
            _check_not_shared(concrete)
        return concrete

    def _concrete(self, program: Callable, rows_spec: tf.TensorSpec, specs: list) -> Any:
        """Traces a program, of a rank's coordinate, its number of rows, and its inputs."""
        axes = self._extended.mesh.coordinates().shape[1]
        coordinate_spec = tf.TensorSpec([axes], tf.int32)
        # Not inlined: a loop in an inlined copy has a name of its own on each device, TensorFlow
        # puts that name into the keys of the collectives in the loop, and ranks would never meet.
        # Nor copied for each device, whose coordinate is a constant.
        with _internal.unspecialized():
            concrete = trace_for_devices(
                program,
                [coordinate_spec, rows_spec, *specs],
                _noinline=True,
                _nospecialize=True,
            )
        _internal.keep_gradients_with(concrete.graph)
        return concrete

    def _program(self, coordinate: tf.Tensor, position: int) -> ReplicaProgram:
        extended = self._extended
        program = ReplicaProgram(
            extended.container_strategy(),
            extended.mesh,
            coordinate,
            extended.tokens.values[position].handle,
            extended.gradient_tokens.values[position].handle,
            extended.collective_keys,
            extended.communication,
            extended.options.sequence_parallel,
            extended.options.context_method,
            position,
            extended.stage_of_position(position),
        )
        program.update_device = extended.host_of_state
        return program

    def _coordinates(self, after: list[tf.Operation]) -> list[tf.Tensor]:
        """The coordinates of the local ranks, each on its device."""
        extended, coordinates = self._extended, []
        for rank, device in zip(extended.local_ranks, extended.worker_devices, strict=True):
            with tf.device(device), tf.control_dependencies(after):
                coordinates.append(tf.constant(extended.mesh.coordinates()[rank]))
        return coordinates

    def _call_all(self, programs: dict[int, Any], inputs: list[list[tf.Tensor]]) -> list[Any]:
        """Places the calls of the programs, by stage, on all local ranks; returns the results."""
        extended = self._extended
        phases = Phases.of(programs[0]) if extended.shares_memory else None
        if phases is not None:
            return self._call_phases(phases, inputs)
        return [
            self._call(programs[extended.stage_of_position(position)], position, mine)
            for position, mine in enumerate(inputs)
        ]

    def _call(self, concrete: Any, position: int, inputs: list[tf.Tensor]) -> Any:
        """Places a call of a program on the device of a local rank."""
        extended = self._extended
        captures = [self._capture_of(tensor, position) for tensor in concrete.captured_inputs]
        with tf.device(extended.worker_devices[position]):
            return _internal.call_with_captures(concrete, inputs, captures)

    def _call_phases(self, phases: Phases, inputs: list[list[tf.Tensor]]) -> list[Any]:
        """Places the calls of a program in phases on the devices of all ranks."""
        extended = self._extended

        def captures_of(concrete, position):
            return [self._capture_of(tensor, position) for tensor in concrete.captured_inputs]

        return phases.call(inputs, captures_of, extended.worker_devices)

    def _capture_of(self, tensor: tf.Tensor, index: int) -> tf.Tensor:
        """What the rank at `index` passes where rank 0's program captured `tensor`."""
        container = _internal.captured_container(tensor)
        if container is None:
            if tf.is_symbolic_tensor(tensor):
                _check_in_scope(tensor)
            return tensor
        check_owner(container, self._extended.container_strategy())
        return container.values[index].handle


def _check_in_scope(tensor: tf.Tensor) -> None:
    """Refuses what a program has captured from another program.

    A `tf.function` that is called in a replica captures what belongs to its program, such as a
    rank's coordinate, and TensorFlow does not trace it again for the next program.
    """
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and tensor.graph is not graph:
        graph = getattr(graph, "outer_graph", None)
    if graph is None:
        raise ValueError(
            "A tf.function that communicates, or reads a variable that is cut over the mesh, was "
            "called in two programs, such as a train step and a test step. Leave out its "
            f"@tf.function: whatever strategy.run or fit calls is traced anyway. Received: {tensor}"
            f" of {tensor.graph.name}."
        )


def _check_not_shared(concrete: Any) -> None:
    """Refuses a program that changes what all devices share.

    TensorFlow lets one device change it after the other, while each waits in a collective for the
    others: for ever.
    """
    for tensor in _internal.written_captures(concrete):
        if _internal.captured_container(tensor) is None:
            owners = [v.name for v in concrete.graph.variables if v.handle is tensor]
            name = owners[0] if owners else "an iterator, a table, a summary writer or the like"
            raise ValueError(
                f"The replica function changes {name}, which was made outside the strategy's scope "
                "and is one for all devices. Make a variable inside `with strategy.scope():`; "
                "use what is no variable outside of strategy.run."
            )


def _own_rows(result: Any) -> Any:
    return batch.own_rows(result) if isinstance(result, tf.Tensor) else result


def _without_gradient(result: Any) -> Any:
    """The same value, of which a gradient is refused: it would be one rank's, and of its own part.

    Each rank has a variable of its own, and the caller's tape knows the first rank's.
    """
    if not (tf.is_tensor(result) and (result.dtype.is_floating or result.dtype.is_complex)):
        return result
    return tf.raw_ops.PreventGradient(
        input=result,
        message=f"It was asked for outside of strategy.run. {HOW_TO_TRAIN}",
    )


def _common_spec(values: tuple[tf.Tensor, ...]) -> tf.TensorSpec:
    """The narrowest spec that all ranks' tensors fit: rows of an uneven batch differ in number."""
    shape = values[0].shape
    for value in values[1:]:
        shape = shape.most_specific_compatible_shape(value.shape)
    return tf.TensorSpec(shape, values[0].dtype)
