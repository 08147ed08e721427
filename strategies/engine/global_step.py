"""A step that is traced once as for one device, and partitioned by rows into the program of a rank.

Losses, metrics, noise and gradients are ops of one graph with global shapes, so that what couples
rows has the value of one device. See `llmos_tf.partition` and docs/adr/0017.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.partition.emission import Emission
from llmos_tf.partition.graph.flat_graph import FlatGraph, Value
from llmos_tf.partition.graph.placements import REPLICATED, Placement, Sharded
from llmos_tf.partition.manual import Storage
from llmos_tf.partition.plan import Plan
from llmos_tf.partition.planner import Planner
from llmos_tf.partition.report import gathered
from llmos_tf.spmd.global_trace import GlobalTrace
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.engine.global_batch import GlobalBatch
from llmos_tf.strategies.engine.storage import storage_of


class GlobalStep:
    """A step, traced with the shapes of the whole batch, and the plan of a rank's program.

    A step that cannot be partitioned is a `ValueError`.

    Args:
        strategy: the mesh strategy.
        fn: the step.
        batch: its arguments.
        all_rows: whether a result that counts rows is that of the whole batch, on every rank.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        fn: Callable,
        batch: GlobalBatch,
        all_rows: bool = False,
    ):
        self._strategy = strategy
        self._trace = GlobalTrace(strategy)
        self._concrete = self._traced(fn, batch)
        graph = self._concrete.graph
        outer = [tensor for tensor, _ in graph.captures]
        storages = [self._storage(tensor) for tensor in outer]
        has_rows = batch.has_rows
        self.graph = FlatGraph(graph, [*has_rows, *[False] * len(outer)], batch.static_rows)
        inputs: list[Placement | Storage | None] = [
            Sharded(0) if is_rows else REPLICATED for is_rows in has_rows
        ]
        self._given = [*inputs, *(REPLICATED for _ in outer)]
        self._outer = outer
        self._is_stored = [storage is not None for storage in storages]
        planner = Planner(self.graph, [*inputs, *storages], self._trace.regions, not all_rows)
        self.plan: Plan = planner.plan
        # The values of which every rank needs all rows.
        self.gathered = gathered(self.plan)
        _warn_of_ops_without_rule(self.gathered)

    def _traced(self, fn: Callable, batch: GlobalBatch) -> Any:
        def step(*tensors):
            args, kwargs = batch.packed(tensors)
            with self._trace, self._strategy.extended.global_hooks():
                return fn(*args, **kwargs)

        concrete = tf.function(step, autograph=False).get_concrete_function(*batch.specs)
        _internal.keep_gradients_with(concrete.graph)
        return concrete

    def _storage(self, tensor: tf.Tensor) -> Storage | None:
        variable = self._trace.variables.get(id(tensor))
        return None if variable is None else storage_of(variable)

    def emit(
        self, program: ReplicaProgram, rows: tuple[Any, Any], tensors: Sequence[tf.Tensor]
    ) -> Any:
        """Makes the program of a rank.

        Args:
            program: the program that is being traced.
            rows: the rank's number of rows and that of the whole batch.
            tensors: the rank's inputs.

        Returns:
            What the step returns: of what counts rows the rank's own.
        """
        emission = Emission(program, *rows, program.mesh.batch_ways, program.axis_index(BATCH_AXES))
        given: list[tuple[Value, Placement, Any]] = []
        outer = [
            None if stored else tensor
            for tensor, stored in zip(self._outer, self._is_stored, strict=True)
        ]
        for value, placement, tensor in zip(
            self.graph.inputs, self._given, [*tensors, *outer], strict=True
        ):
            given.append((value, placement, tensor))
        results = emission.run(self.plan, given, self.graph.outputs)
        structure = self._concrete.structured_outputs
        remaining = iter(results)
        flat = [
            next(remaining) if leaf is not None else None
            for leaf in tf.nest.flatten(structure, expand_composites=True)
        ]
        return tf.nest.pack_sequence_as(structure, flat, expand_composites=True)


def _warn_of_ops_without_rule(rows: Sequence[dict[str, Any]]) -> None:
    slow = [row for row in rows if row["without_rule"]]
    if slow:
        listed = "; ".join(
            f"{', '.join(row['without_rule'])} of {row['op']} "
            f"({row['bytes_per_row'] or 'an unknown number of'} bytes per row)"
            for row in slow
        )
        warnings.warn(
            "A step gathers rows for ops that have no rule for rows on several ranks. Every rank "
            f"computes all of them: the result is right, and slower. They are: {listed}. "
            "strategy.explain(model) lists all that is gathered.",
            stacklevel=2,
        )
