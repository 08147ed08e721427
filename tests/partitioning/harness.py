"""Runs a function of tensors on the ranks of a mesh by its plan, and tells what the plan is."""

import functools

import numpy as np
import tensorflow as tf

from llmos_tf.mesh import BATCH_AXES, Mesh
from llmos_tf.partition.emission import Emission
from llmos_tf.partition.graph.flat_graph import FlatGraph
from llmos_tf.partition.graph.placements import REPLICATED, Partial, Sharded
from llmos_tf.partition.planner import Planner
from llmos_tf.spmd.program import require_program
from llmos_tf.strategies import MeshStrategy


@functools.cache
def strategy_of(ways):
    """One strategy for each number of ranks, as its devices and keys are the same in all tests."""
    return MeshStrategy(Mesh(data=ways))


class Partitioned:
    """A function, traced once with global shapes and planned.

    Args:
        fn: takes tensors; returns nested tensors.
        values: example arguments, arrays.
        rows: for each of them, whether its first dimension counts rows, of which each rank has its
            own; or "all" where it counts rows and every rank has all of them. What counts none
            every rank has.
        static: whether the number of rows is known to the trace.
    """

    def __init__(self, fn, values, rows, static=False):
        self.fn = fn
        self._rows = list(rows)
        self._static = static
        self._specs = [
            tf.TensorSpec(_shape(v, r and not static), tf.convert_to_tensor(v).dtype)
            for v, r in zip(values, rows, strict=True)
        ]
        self._concrete = tf.function(fn, autograph=False).get_concrete_function(*self._specs)
        captures = [tensor for tensor, _ in self._concrete.graph.captures]
        num_rows = None
        if static:
            num_rows = next(len(v) for v, r in zip(values, rows, strict=True) if r)
        self.graph = FlatGraph(
            self._concrete.graph, [*map(bool, rows), *[False] * len(captures)], num_rows
        )
        self._captures = captures
        self._placements = [Sharded(0) if r is True else REPLICATED for r in rows]
        self._placements += [REPLICATED] * len(captures)
        self.plan = Planner(self.graph, self._placements).plan
        self._functions = {}

    # --- what the plan is -------------------------------------------------------------------------

    @property
    def without_rule(self):
        """Types of the ops that are computed whole although an input is sharded."""
        return sorted({node.type for node in self.plan.without_rule})

    @property
    def gathers(self):
        """Names of the values that are gathered."""
        changes = self.plan.changes
        return [c.value.node.name for c in changes if isinstance(c.source, Sharded)]

    @property
    def reductions(self):
        """Names of the values whose parts are reduced."""
        return [c.value.node.name for c in self.plan.changes if isinstance(c.source, Partial)]

    def types_in(self, scope):
        """Types of the ops of the graph whose names begin with a scope."""
        return {node.type for node in self.graph.nodes if node.name.startswith(f"{scope}/")}

    def whole_in(self, scope):
        """Types of the ops of a scope that are computed whole."""
        return sorted(n.type for n in self.plan.without_rule if n.name.startswith(f"{scope}/"))

    # --- its values -------------------------------------------------------------------------------

    def run(self, ways, values):
        """Returns the results on `ways` ranks, put together, as flat arrays."""
        if ways not in self._functions:
            self._functions[ways] = self._program(ways)
        packed = self._functions[ways](*map(tf.constant, values))
        local = strategy_of(ways).experimental_local_results
        ranks = zip(*(map(np.asarray, local(value)) for value in packed), strict=True)
        results = zip(*(_unpacked(values, self.graph.outputs) for values in ranks), strict=True)
        put_together = []
        for parts, placement, output in zip(
            results, self.plan.outputs, self.graph.outputs, strict=True
        ):
            if isinstance(placement, Sharded):
                put_together.append(np.concatenate(parts, placement.dim))
            else:
                for part in parts[1:]:
                    name = f"{output.node.inputs[0].node.name} on {ways} ranks"
                    np.testing.assert_array_equal(part, parts[0], err_msg=name)
                put_together.append(parts[0])
        return put_together

    def _program(self, ways):
        def program(*tensors):
            replica = require_program("a test")
            index = replica.axis_index(BATCH_AXES)
            with_rows = next(x for x, r in zip(tensors, self._rows, strict=True) if r)
            if self._static:
                all_rows = with_rows.shape[0]
                first, own = index * (all_rows // ways), all_rows // ways
            else:
                all_rows = tf.shape(with_rows)[0]
                first = index * all_rows // ways
                own = (index + 1) * all_rows // ways - first
            emission = Emission(replica, own, all_rows, ways, index)
            mine = []
            for x, has_rows in zip(tensors, self._rows, strict=True):
                if has_rows is True:
                    shape = [own if self._static else None, *x.shape[1:]]
                    x = x[first : first + own]
                    x.set_shape(shape)
                mine.append(x)
            given = zip(self.graph.inputs, self._placements, [*mine, *self._captures], strict=True)
            return _packed(emission.run(self.plan, list(given), self.graph.outputs))

        strategy = strategy_of(ways)

        @tf.function(autograph=False, input_signature=self._specs)
        def run(*tensors):
            return strategy.run(program, args=tensors)

        return run

    def compare(self, ways, values, rtol=1e-12, atol=1e-12):
        """Compares the results on `ways` ranks with those of one device.

        Sums of float64 numbers near 1 are of other order on ranks, which changes them by some 1e-16
        for each number that is added: 1e-12 is far from that, and from what a lost row would do.
        float32 results, of kernels that have no others, get 1e-5 for the same reason.
        """
        expected = tf.nest.flatten(self._concrete(*map(tf.constant, values)))
        found = self.run(ways, values)
        for tensor, mine, output in zip(expected, found, self.graph.outputs, strict=True):
            want = np.asarray(tensor)
            message = f"{output.node.inputs[0].node.name} on {ways} ranks"
            assert want.shape == mine.shape, f"{message}: {want.shape} is {mine.shape}"
            if want.dtype.kind in "fc":
                loose = max(1, np.finfo(want.dtype).eps / np.finfo(np.float64).eps / 50)
                np.testing.assert_allclose(mine, want, rtol * loose, atol * loose, err_msg=message)
            else:
                np.testing.assert_array_equal(mine, want, err_msg=message)


def _packed(tensors):
    """One vector for each dtype, and one of all shapes: each result of a program takes time."""
    kinds = {}
    for x in tensors:
        kinds.setdefault(x.dtype, []).append(tf.reshape(x, [-1]))
    shapes = tf.concat([tf.shape(x) for x in tensors], 0)
    return [shapes, *(tf.concat(flat, 0) for flat in kinds.values())]


def _unpacked(values, outputs):
    shapes, *flat = values
    kinds = list(dict.fromkeys(output.dtype for output in outputs))
    remaining = dict(zip(kinds, flat, strict=True))
    results = []
    for output in outputs:
        shape, shapes = shapes[: output.rank], shapes[output.rank :]
        x, remaining[output.dtype] = np.split(remaining[output.dtype], [np.prod(shape, dtype=int)])
        results.append(x.reshape(shape))
    return results


def _shape(value, unknown_rows):
    shape = list(np.shape(value))
    return [None, *shape[1:]] if unknown_rows else shape
