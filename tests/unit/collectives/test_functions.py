"""Collectives: against numpy along every set of axes, forward and backward, on every rank.

The numbers are small and whole, so every sum is exact in every type and results are compared for
equality.
"""

import contextlib
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy

SPLIT = ("data", "fsdp", "tensor")
MESH = Mesh(data=2, fsdp=2, tensor=2)
AXIS_SETS = [axes for length in range(1, 4) for axes in itertools.combinations(SPLIT, length)] + [
    ("pipe",),
    ("context", "expert"),
]


LAST = "last member"


class Case(NamedTuple):
    """A collective, and what numpy says of it: values of a group's members to their results."""

    op: str
    options: dict
    forward: Callable
    backward: Callable | None

    @property
    def name(self):
        return f"{self.op}({','.join(f'{key}={value}' for key, value in self.options.items())})"

    def call(self, x, axes):
        options = dict(self.options)
        if options.get("root") == LAST:
            options["root"] = collectives.axis_size(axes) - 1
        return getattr(collectives, self.op)(x, axes, **options)


def _same(xs):
    return xs


def _sum(xs):
    return [sum(xs)] * len(xs)


def _extreme(function):
    return lambda xs: [functools.reduce(function, xs)] * len(xs)


def _gather(dim):
    return lambda xs: [np.concatenate(xs, dim)] * len(xs)


def _part(dim):
    return lambda xs: [np.split(x, len(xs), dim)[i] for i, x in enumerate(xs)]


def _scatter(dim):
    return lambda xs: _part(dim)(_sum(xs))


def _exchange(split_dim, concat_dim):
    def exchanged(xs):
        parts = [np.split(x, len(xs), split_dim) for x in xs]
        return [np.concatenate([p[i] for p in parts], concat_dim) for i in range(len(xs))]

    return exchanged


def _spread(root):
    return lambda xs: [xs[root]] * len(xs)


def _collect(root):
    return lambda xs: [sum(xs) if x is xs[root] else 0 * x for x in xs]


def _shift(places):
    return lambda xs: [xs[(i - places) % len(xs)] for i in range(len(xs))]


CASES = [
    Case("all_reduce", {}, _sum, _sum),
    Case("all_reduce", {"hierarchical": True}, _sum, _sum),
    Case("all_reduce", {"op": "max"}, _extreme(np.maximum), None),
    Case("all_reduce", {"op": "min"}, _extreme(np.minimum), None),
    Case("all_gather", {}, _gather(0), _scatter(0)),
    Case("all_gather", {"dim": 1}, _gather(1), _scatter(1)),
    Case("all_gather", {"dim": -1}, _gather(2), _scatter(2)),
    Case("reduce_scatter", {}, _scatter(0), _gather(0)),
    Case("reduce_scatter", {"dim": 1}, _scatter(1), _gather(1)),
    Case("reduce_scatter", {"dim": -1}, _scatter(2), _gather(2)),
    Case("all_to_all", {}, _exchange(0, 0), _exchange(0, 0)),
    Case("all_to_all", {"concat_dim": 1}, _exchange(0, 1), _exchange(1, 0)),
    Case("all_to_all", {"split_dim": 2}, _exchange(2, 0), _exchange(0, 2)),
    Case("all_to_all", {"split_dim": -2, "concat_dim": -1}, _exchange(1, 2), _exchange(2, 1)),
    Case("broadcast", {}, _spread(0), _collect(0)),
    Case("broadcast", {"root": LAST}, _spread(-1), _collect(-1)),
    Case("permute", {}, _shift(1), _shift(-1)),
    Case("permute", {"shift": -1}, _shift(-1), _shift(1)),
    Case("permute", {"shift": 2}, _shift(2), _shift(-2)),
    # Megatron's pairs: each is the other's gradient, for a loss that all members compute alike.
    Case("copy_to_axis", {}, _same, _sum),
    Case("reduce_from_axis", {}, _sum, _same),
    Case("gather_from_axis", {}, _gather(2), _part(2)),
    Case("gather_from_axis", {"dim": 1}, _gather(1), _part(1)),
    Case("split_to_axis", {}, _part(2), _gather(2)),
    Case("split_to_axis", {"dim": 0}, _part(0), _gather(0)),
]


def small_numbers(seed, shape):
    """A row a rank of whole numbers of at most 9: their sums are exact even in bfloat16."""
    return np.random.default_rng(seed).integers(-9, 10, (MESH.size, *shape)).astype(np.float64)


def in_groups(function, table, axes):
    """Applies a function of a group's members to every group along `axes`."""
    results = [None] * len(table)
    for group in MESH.groups(axes):
        for rank, y in zip(group, function([table[r] for r in group]), strict=True):
            results[rank] = y
    return np.stack(results)


def input_shape(axes):
    """A shape that every group along `axes` divides."""
    size = MESH.axis_size(axes)
    return (size, 2 * size, size)


def rank_of(axes=SPLIT):
    return collectives.axis_index(axes)


def of_every_rank(tensors):
    """All ranks' values of tensors of one type, by one collective: key -> [ranks, ...]."""
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors.values()], 0)
    rows = tf.reshape(collectives.all_gather(flat, SPLIT), [MESH.size, -1])
    sizes = [tensor.shape.num_elements() for tensor in tensors.values()]
    parts = tf.split(rows, sizes, axis=1)
    return {
        key: tf.reshape(part, [MESH.size, *tensor.shape])
        for (key, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def run(strategy, program, *args):
    """Runs a program that returns `of_every_rank`, and gives it as arrays."""
    return {key: local(strategy, value) for key, value in strategy.run(program, args).items()}


def local(strategy, value):
    """What the first part of the batch returned, as an array."""
    return strategy.experimental_local_results(value)[0].numpy()


@contextlib.contextmanager
def unoptimized():
    """Without the graph optimizer, which takes half of the time of a large program."""
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    yield
    off = before.get("disable_meta_optimizer", False)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": off})


@pytest.fixture(scope="module")
def strategy():
    return MeshStrategy(MESH)


# All sets of axes in float64. The other types, in the program as it is optimized, along one set,
# whose groups are neither neighbours nor equally far apart.
SETS_OF = {
    tf.float64: AXIS_SETS,
    tf.float32: [("data", "tensor")],
    tf.bfloat16: [("data", "tensor")],
    tf.int32: [("data", "tensor")],
}


@pytest.fixture(scope="module")
def every_result(strategy):
    """Of a type: (axes, case, "y" or "gradient") -> all ranks' values, from one program a type."""

    def program_of(dtype):
        found = {}
        for axes, (number, case) in itertools.product(SETS_OF[dtype], enumerate(CASES)):
            x = tf.constant(small_numbers([number, 0], input_shape(axes)), dtype)[rank_of()]
            with tf.GradientTape() as tape:
                tape.watch(x)
                # The order in which axes are named has no meaning.
                y = case.call(x, axes[:: -1 if number % 2 else 1])
            found[axes, case.name, "y"] = y
            if dtype.is_floating:
                upstream = tf.constant(small_numbers([number, 1], y.shape), dtype)[rank_of()]
                gradient = tape.gradient(y, x, upstream)
                if gradient is not None:
                    found[axes, case.name, "gradient"] = gradient
        return of_every_rank(found)

    @functools.cache
    def results(dtype):
        with unoptimized() if dtype == tf.float64 else contextlib.nullcontext():
            return run(strategy, lambda: program_of(dtype))

    return results


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_along_every_set_of_axes(every_result, case):
    """Catches a group, an order of members or a dimension that is wrong, forward or backward."""
    number = CASES.index(case)
    for dtype, axes in [(d, axes) for d, sets in SETS_OF.items() for axes in sets]:
        seen, results = f"{dtype.name} along {axes}", every_result(dtype)
        expected = in_groups(case.forward, small_numbers([number, 0], input_shape(axes)), axes)
        y = results[axes, case.name, "y"]
        assert y.dtype == dtype.as_numpy_dtype
        np.testing.assert_array_equal(y.astype(np.float64), expected, err_msg=seen)
        gradient = results.get((axes, case.name, "gradient"))
        if case.backward is None or not dtype.is_floating:
            assert gradient is None, seen
        else:
            upstream = small_numbers([number, 1], expected.shape[1:])
            expected = in_groups(case.backward, upstream, axes)
            np.testing.assert_array_equal(gradient.astype(np.float64), expected, err_msg=seen)


def test_the_gradients_above_are_adjoints():
    """Catches an expected gradient above that is not the transpose of the forward function."""
    checked = 0
    for axes, case in itertools.product(AXIS_SETS, CASES):
        if case.backward is None or case.op.endswith("_axis"):
            continue
        x = small_numbers([1], input_shape(axes))
        y = in_groups(case.forward, x, axes)
        upstream = small_numbers([2], y.shape[1:])
        gradient = in_groups(case.backward, upstream, axes)
        assert (y * upstream).sum() == (x * gradient).sum(), (axes, case.name)
        checked += 1
    assert checked > 100


def test_positions_and_sizes(strategy):
    """Catches an index that counts another axis as the slowest than the mesh does."""

    def program():
        sizes = [collectives.axis_size(axes) for axes in AXIS_SETS]
        assert sizes == [MESH.axis_size(axes) for axes in AXIS_SETS]
        return of_every_rank({axes: collectives.axis_index(axes[::-1]) for axes in AXIS_SETS})

    for axes, indices in run(strategy, program).items():
        assert indices.tolist() == [MESH.index_along(rank, axes) for rank in range(MESH.size)]


def test_shapes_that_are_known_only_when_it_runs(strategy):
    """Catches an op that needs a static length, or fails when the next batch has another.

    Two of the shapes have as many elements, in other dimensions.
    """
    axes = ("fsdp", "tensor")

    def program(x):
        x += tf.cast(rank_of(), x.dtype)
        found = []
        for case in CASES:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = case.call(x, axes)
            found.append(y)
            if case.backward:
                found.append(tape.gradient(y, x, tf.square(y)))
        flat = tf.concat([tf.reshape(value, [-1]) for value in found], 0)
        return collectives.all_gather(flat[tf.newaxis], SPLIT)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None], tf.float64)])
    def step(x):
        return strategy.run(program, args=(x,))

    for shape in [(4, 8, 4), (8, 4, 4), (4, 4, 4)]:
        x = np.random.default_rng(0).integers(-9, 10, shape).astype(np.float64)
        with unoptimized():
            flat = local(strategy, step(x))
        table = x + np.arange(MESH.size).reshape(-1, 1, 1, 1)
        for case in CASES:
            y = in_groups(case.forward, table, axes)
            expected = [y, in_groups(case.backward, y**2, axes)] if case.backward else [y]
            for value in expected:
                size = value[0].size
                seen = flat[:, :size].reshape(value.shape)
                np.testing.assert_array_equal(seen, value, case.name)
                flat = flat[:, size:]
        assert flat.shape == (MESH.size, 0)


def test_in_loops_and_conditions(strategy):
    """Catches an op that captures from another body, or whose ranks meet in another turn.

    One condition is met by half of the groups, one by all. The loop has a gradient.
    """
    axes, turns = ("data", "tensor"), 3
    start, upstream = small_numbers([0], (4, 4)), small_numbers([1], (4, 4))
    keep_shape = {"all_reduce", "all_to_all", "broadcast", "permute", "reduce_from_axis"}
    steps = [c for c in CASES if c.op in keep_shape and c.options.get("split_dim", 0) == 0]

    def there_and_back(x):
        y = collectives.reduce_scatter(collectives.all_gather(x, axes, 1), axes, 1)
        return collectives.gather_from_axis(collectives.split_to_axis(y, axes, 0), axes, 0)

    def every_op(x):
        for case in steps:
            # An exchange may make it longer in one dimension and shorter in the other.
            x = tf.reshape(case.call(x, axes), [4, 4]) % 7.0
        return there_and_back(x) % 7.0

    def linear(x):
        x = collectives.all_to_all(collectives.all_reduce(x, "fsdp"), axes)
        return there_and_back(collectives.copy_to_axis(collectives.permute(x, axes), "tensor"))

    def loop(body, x):
        return tf.while_loop(lambda i, x: i < turns, lambda i, x: (i + 1, body(x)), [0, x])[1]

    def program():
        x = tf.constant(start)[rank_of()]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = loop(linear, x)
        mine = tf.equal(rank_of("fsdp"), 1)
        everyones = tf.equal(collectives.all_reduce(1, SPLIT), MESH.size)
        return of_every_rank(
            {
                "looped": loop(every_op, x),
                "linear": y,
                "gradient": tape.gradient(y, x, tf.constant(upstream)[rank_of()]),
                "half": tf.cond(mine, lambda: every_op(x), lambda: there_and_back(x)),
                "all": tf.cond(everyones, lambda: linear(x), lambda: x),
            }
        )

    def turned(function, x):
        for _ in range(turns):
            x = function(x)
        return x

    def numpy_there_and_back(x):
        x = in_groups(_scatter(1), in_groups(_gather(1), x, axes), axes)
        return in_groups(_gather(0), in_groups(_part(0), x, axes), axes)

    def numpy_every_op(x):
        for case in steps:
            x = in_groups(case.forward, x, axes).reshape(x.shape) % 7.0
        return numpy_there_and_back(x) % 7.0

    def numpy_linear(x):
        x = in_groups(_exchange(0, 0), in_groups(_sum, x, ("fsdp",)), axes)
        return numpy_there_and_back(in_groups(_shift(1), x, axes))

    def numpy_gradient(x):
        # The scatter and the gather are each other's; the Megatron pair passes its own part on.
        x = in_groups(_gather(0), in_groups(_part(0), x, axes), axes)
        x = in_groups(_sum, x, axes)
        x = in_groups(_shift(-1), in_groups(_sum, x, ("tensor",)), axes)
        return in_groups(_sum, in_groups(_exchange(0, 0), x, axes), ("fsdp",))

    results = run(strategy, program)
    second = np.array([MESH.coordinate(rank)["fsdp"] == 1 for rank in range(MESH.size)])
    expected = {
        "looped": turned(numpy_every_op, start),
        "linear": turned(numpy_linear, start),
        "gradient": turned(numpy_gradient, upstream),
        "half": np.where(second[:, None, None], numpy_every_op(start), numpy_there_and_back(start)),
        "all": numpy_linear(start),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(results[name], value, name)


def test_values_that_are_moved_stay_as_they_are(strategy):
    """Catches a transport that computes: a NaN of one rank would reach ranks it is not sent to."""
    special = np.array([[np.nan] * 8, [np.inf] * 8, [-np.inf] * 8, *[[r] * 8 for r in range(5)]])

    def program(dtype):
        x = tf.cast(special, dtype)[rank_of()]
        moved = {
            "permute": collectives.permute(x, SPLIT),
            "broadcast": collectives.broadcast(x, SPLIT, root=7),
            "all_to_all": collectives.all_to_all(x, SPLIT),
            "all_gather": collectives.all_gather(x, SPLIT),
        }
        return {name: tf.cast(y, tf.float64) for name, y in of_every_rank(moved).items()}

    for dtype in (tf.float32, tf.bfloat16):
        results = run(strategy, lambda dtype=dtype: program(dtype))
        np.testing.assert_array_equal(results["permute"], np.roll(special, 1, 0))
        np.testing.assert_array_equal(results["broadcast"], np.full((8, 8), 4.0))
        np.testing.assert_array_equal(results["all_to_all"], special.T)
        np.testing.assert_array_equal(results["all_gather"], [special.ravel()] * 8)


def test_along_an_axis_of_size_one_nothing_is_sent(strategy):
    """Catches a collective op in the program of a group of one."""

    def ops_of(axes):
        def program():
            x = tf.ones((8, 8, 8)) * tf.cast(rank_of(), tf.float32)
            with tf.GradientTape() as tape:
                tape.watch(x)
                ys = [case.call(x, axes) for case in CASES]
            return ys, tape.gradient(ys, x)

        graph = tf.function(lambda: strategy.run(program)).get_concrete_function().graph
        functions = graph.as_graph_def().library.function
        return {node.op for f in functions for node in f.node_def if "Collective" in node.op}

    assert ops_of(("pipe", "context", "expert")) == set()
    assert ops_of(("pipe", "tensor")) == {
        "CollectiveReduceV2",
        "CollectiveGatherV2",
        "CollectiveAllToAllV2",
        "CollectiveBcastSendV2",
        "CollectiveBcastRecvV2",
    }


def test_strategies_of_different_sizes_do_not_meet(strategy):
    """Catches two strategies whose groups have one key, and a second run that differs."""
    other = MeshStrategy(Mesh(data=4))

    def total():
        return collectives.all_reduce(tf.cast(rank_of() + 1, tf.float32), SPLIT)

    @tf.function
    def both():
        return strategy.run(total), other.run(total)

    for _ in range(2):
        assert local(strategy, strategy.run(total)) == 36
        assert local(other, other.run(total)) == 10
        assert [int(local(s, y)) for s, y in zip((strategy, other), both(), strict=True)] == [
            36,
            10,
        ]


def test_a_function_is_traced_once_and_never_taken_for_another(strategy):
    """Catches a program that is traced at each run, or run in place of one that wraps the same."""

    def scaled_by(factor):
        def plain(x):
            return collectives.all_reduce(x, SPLIT)

        return functools.wraps(scaled_by)(lambda x: factor * plain(x))

    twice, thrice = scaled_by(2.0), scaled_by(3.0)
    before = strategy.num_traces
    for value in (1.0, 5.0):
        assert local(strategy, strategy.run(twice, (tf.constant(value),))) == 16 * value
    assert strategy.num_traces == before + 1
    assert local(strategy, strategy.run(thrice, (tf.constant(1.0),))) == 24


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: collectives.all_reduce(x, "data", op="mean"), "op='mean'"),
        (
            lambda x: collectives.all_reduce(x, SPLIT, op="max", hierarchical=True),
            "op='max'. Leave hierarchical out",
        ),
        (lambda x: collectives.all_reduce(x, "batch"), "Received: 'batch'"),
        (lambda x: collectives.all_reduce(x > 0, "data"), "a boolean tensor"),
        (lambda x: collectives.broadcast(x, "data", root=2), "root=2"),
        (lambda x: collectives.broadcast(x, "data", root=-1), "root=-1"),
        (lambda x: collectives.reduce_scatter(x, SPLIT), "(4, 6), whose 4 is not divisible by 8"),
        (lambda x: collectives.all_to_all(x, SPLIT, 1), "(4, 6), whose 6 is not divisible by 8"),
        (lambda x: collectives.split_to_axis(x, SPLIT), "(4, 6), whose 6 is not divisible by 8"),
        (lambda x: collectives.all_gather(x[:0], "data"), "all_gather along data takes no tensor"),
        (lambda x: collectives.all_to_all(x[:0], "data"), "one of shape (2, 0, 6)"),
        (lambda x: collectives.reduce_scatter(x[:, :0], "data"), "one of shape (2, 2, 0)"),
    ],
)
def test_a_misuse_is_named(strategy, call, named):
    """Catches a misuse that TensorFlow would only report when it runs, on some rank, or never."""
    with pytest.raises(ValueError, match="Received") as error:
        strategy.run(lambda: call(tf.ones((4, 6))))
    assert named in str(error.value)


EMPTY = """
import tensorflow as tf
from llmos_tf import Mesh, collectives, devices
from llmos_tf.strategies import MeshStrategy

devices.configure_virtual_cpus(2)
strategy = MeshStrategy(Mesh(data=2))
step = lambda n: strategy.run(lambda: collectives.all_gather(tf.ones([n, 3]), "data"))
try:
    tf.function(step, autograph=False)(tf.constant(0))
except tf.errors.OpError as error:
    print("refused")
"""


def test_nothing_is_refused_when_it_runs():
    """Catches a process that ends without a word, as TensorFlow divides by a length of zero.

    In a process of its own: after an error no collective of a process can be trusted.
    """
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", EMPTY]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.stdout == "refused\n", result.stderr[-2000:]


def test_outside_a_program():
    """Catches a collective that does nothing, or fails obscurely, outside of strategy.run."""
    calls = [functools.partial(case.call, tf.ones((8, 8, 8)), "data") for case in CASES]
    calls += [lambda: collectives.axis_index("data"), lambda: collectives.axis_size("data")]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"collectives\.\w+ works inside the program"):
            call()
