"""Functions that a strategy runs, and reducing and gathering what they return."""

import functools
import re
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_strategies import MESHES, context, local, per_replica, replica_id, strategy_of

from llmos_tf import collectives

pytestmark = [pytest.mark.fast, pytest.mark.graph_optimizer]

# --- running functions ----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_run_takes_and_returns_what_any_strategy_does(mesh):
    """Catches an argument that reaches another replica, or a structure that comes back changed."""
    strategy = strategy_of(mesh)
    n = strategy.num_replicas_in_sync
    values = per_replica(strategy)

    def fn(x, y, flag, *rest, scale, nested):
        assert flag is True
        total = x * scale + tf.cast(y, tf.float32) + sum(rest)
        more = [nested["a"] + nested["b"][0], None]
        return {"total": total, "none": None, "more": (more, x)}

    def call():
        return strategy.run(
            fn,
            args=(values, 3, True, values),
            kwargs={"scale": tf.constant(10.0), "nested": {"a": values, "b": [tf.constant(0.5)]}},
        )

    for result in (call(), tf.function(call)()):
        assert set(result) == {"total", "none", "more"}
        assert result["none"] is None
        assert local(strategy, result["total"]) == [11 * i + 3 for i in range(1, n + 1)]
        (first, second), last = result["more"]
        assert second is None
        assert local(strategy, first) == [i + 0.5 for i in range(1, n + 1)]
        assert local(strategy, last) == [float(i) for i in range(1, n + 1)]
        assert isinstance(last, tf.distribute.DistributedValues) == (n > 1)
    assert strategy.run(lambda: None) is None


def test_run_takes_methods_and_tf_functions():
    """Catches a callable that is not a plain function, or that AutoGraph has to convert."""
    strategy = strategy_of("data2")

    class Doubler:
        def __call__(self, x):
            return 2 * x

        def method(self, x):
            return self(x)

    @tf.function
    def countdown(x):
        while x > 0:
            x -= 2
        return x

    def plain(x):
        if tf.distribute.get_replica_context().replica_id_in_sync_group == 0:
            x = -x
        return x

    values = per_replica(strategy)
    assert local(strategy, strategy.run(Doubler(), (values,))) == [2, 4]
    assert local(strategy, strategy.run(Doubler().method, (values,))) == [2, 4]
    assert local(strategy, strategy.run(functools.partial(Doubler()), (values,))) == [2, 4]
    assert local(strategy, strategy.run(countdown, (values,))) == [-1, 0]
    in_function = tf.function(lambda: strategy.run(plain, (values,)))
    assert local(strategy, in_function()) == [-1, 2]
    assert local(strategy, strategy.run(tf.function(plain), (values,))) == [-1, 2]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_replica_context(mesh):
    """Catches a sum over ranks in place of replicas, or a gradient that is not the sum's."""
    strategy = strategy_of(mesh)
    n = strategy.num_replicas_in_sync
    ids = list(range(n))

    def fn():
        assert context().strategy is strategy is tf.distribute.get_strategy()
        assert context().num_replicas_in_sync == n
        assert tf.distribute.in_cross_replica_context() is False
        x = replica_id() + 1
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = context().all_reduce("SUM", x * x)
        return {
            "id": context().replica_id_in_sync_group,
            "sum": context().all_reduce(tf.distribute.ReduceOp.SUM, x),
            "mean": context().all_reduce("MEAN", {"x": x, "y": [10 * x]}),
            "gradient": tape.gradient(y, x),
            "rows": context().all_gather(tf.stack([[x, -x]]), axis=0),
            "columns": context().all_gather(tf.stack([[x], [0.0]]), axis=1),
        }

    seen = {k: v for k, v in strategy.run(fn).items() if k != "mean"}
    seen = {k: local(strategy, v) for k, v in seen.items()}
    total = n * (n + 1) / 2
    assert seen["id"] == ids
    assert seen["sum"] == [total] * n
    # What every replica's sum owes it: n times 2x.
    assert seen["gradient"] == [2 * n * (i + 1) for i in ids]
    assert seen["rows"] == [[[i + 1, -i - 1] for i in ids]] * n
    assert seen["columns"] == [[[i + 1 for i in ids], [0.0] * n]] * n
    mean = strategy.run(fn)["mean"]
    assert local(strategy, mean["x"]) == [total / n] * n
    assert local(strategy, mean["y"][0]) == [10 * total / n] * n


def test_merge_call_is_refused():
    """Catches a merge_call that runs in the program of one rank, as if there were no others."""
    strategy = strategy_of("data2")

    def fn():
        return context().merge_call(lambda strategy, x: x, args=(tf.constant(1.0),))

    with pytest.raises(RuntimeError, match=r"no cross-replica code inside .* all_reduce"):
        strategy.run(fn)


def test_a_value_of_another_replica_is_not_taken():
    """Catches a per-replica value that is captured: every replica would see the first one's."""
    strategy = strategy_of("data2")
    values = per_replica(strategy)
    with pytest.raises((TypeError, ValueError)):
        strategy.run(lambda: tf.identity(values))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_gradient_from_outside_is_refused(mesh):
    """Catches a gradient of what a run returns, which was that of the first rank's part."""
    strategy = strategy_of(mesh)
    with strategy.scope():
        variable = tf.Variable(2.0)

    @tf.function(autograph=False)
    def outside():
        with tf.GradientTape() as tape:
            loss = strategy.reduce("SUM", strategy.run(lambda: variable * variable), axis=None)
        return tape.gradient(loss, variable)

    with pytest.raises(LookupError, match="a function with the GradientTape and the optimizer"):
        outside()


def test_what_is_one_for_all_devices_is_not_changed_in_turns():
    """Catches devices that take turns in a shared resource and meet in a collective: for ever.

    Reading it is no change, and neither is a look-up in a table.
    """
    strategy = strategy_of("data4")
    outside = tf.Variable(1.0, name="outside")
    lookup = keras.layers.StringLookup(vocabulary=["a", "b"])
    rows = iter(tf.data.Dataset.range(10))

    def read():
        found = tf.cast(lookup(tf.constant("b")), tf.float32)
        return context().all_reduce("SUM", outside + found)

    assert local(strategy, strategy.run(read)) == [12] * 4
    with pytest.raises(ValueError, match=r"changes outside:0, which was made outside the strategy"):
        strategy.run(lambda: context().all_reduce("SUM", outside.assign_add(1.0)))
    with pytest.raises(ValueError, match="changes an iterator"):
        strategy.run(lambda: context().all_reduce("SUM", next(rows)))


def test_a_tf_function_of_two_programs_is_named():
    """Catches TensorFlow's "out of scope", which says nothing of programs."""
    strategy = strategy_of("data2")

    @tf.function
    def inner(x):
        return context().all_reduce("SUM", x)

    assert local(strategy, strategy.run(lambda: inner(tf.constant(1.0)))) == [2, 2]
    with pytest.raises(ValueError, match=r"called in two programs,.* Leave out its @tf.function"):
        strategy.run(lambda: inner(tf.constant(1.0)))


# --- reducing and gathering -----------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_reduce(mesh):
    """Catches a mean over ranks, a mean of means, or a plain value that is counted once."""
    strategy = strategy_of(mesh)
    n = strategy.num_replicas_in_sync
    values = per_replica(strategy)
    total = n * (n + 1) / 2
    assert float(strategy.reduce("SUM", values, axis=None)) == total
    assert float(strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None)) == total / n
    nested = strategy.reduce("SUM", {"a": values, "b": [values]}, axis=None)
    assert float(nested["a"]) == float(nested["b"][0]) == total
    # One value for all replicas counts for each.
    assert float(strategy.reduce("SUM", tf.constant(3.0), axis=None)) == 3 * n
    assert float(strategy.reduce("MEAN", 3.0, axis=None)) == 3
    graph = tf.function(lambda: strategy.reduce("SUM", strategy.run(replica_id), axis=None))
    assert float(graph()) == total - n
    # Replica i has i + 1 rows of the value i + 1.
    rows = per_replica(strategy, lambda i: [[float(i + 1)] * 2] * (i + 1))
    squares = sum(i * i for i in range(1, n + 1))
    assert strategy.reduce("SUM", rows, axis=0).numpy().tolist() == [squares] * 2
    mean = strategy.reduce("MEAN", rows, axis=0).numpy()
    np.testing.assert_allclose(mean, [squares / total] * 2, rtol=1e-6)
    assert float(strategy.extended.reduce_to("SUM", values, "CPU:0")) == total
    pairs = [(values, "CPU:0"), (rows, "CPU:0")]
    first, second = strategy.extended.batch_reduce_to(tf.distribute.ReduceOp.SUM, pairs)
    assert float(first) == total
    # As long as the longest: the first row is the sum of all, the last that of the last replica.
    assert (second.shape, second[0, 0], second[-1, 0]) == ((n, 2), total, n)


@pytest.mark.parametrize("mesh", MESHES)
def test_gather(mesh):
    """Catches replicas in another order, or rows of another number that do not fit."""
    strategy = strategy_of(mesh)
    n = strategy.num_replicas_in_sync
    rows = per_replica(strategy, lambda i: [[i]] * (i + 1))
    expected = [[i] for i in range(n) for _ in range(i + 1)]
    assert strategy.gather(rows, axis=0).numpy().tolist() == expected
    columns = per_replica(strategy, lambda i: [[i] * (i + 1)])
    assert strategy.gather(columns, axis=1).numpy().tolist() == [[i for (i,) in expected]]

    def fn(rows, columns):
        return context().all_gather({"rows": rows, "columns": [columns]}, axis=0)

    # In a program too replicas may differ in the number of rows.
    same = per_replica(strategy, lambda i: [[i, i]])
    gathered = strategy.run(fn, (rows, same))
    assert local(strategy, gathered["rows"]) == [expected] * n
    assert local(strategy, gathered["columns"][0]) == [[[i, i] for i in range(n)]] * n
    ragged = strategy.run(lambda x: context().all_gather(x, axis=-1), (columns,))
    assert local(strategy, ragged) == [[[i for (i,) in expected]]] * n


@pytest.mark.parametrize("mesh", ["data2", "tensor2"])
def test_programs_are_called_with_fewer_passes(mesh):
    """Fails if a program is optimized by TensorFlow's MLIR passes for each device, or if what the
    user has set for the optimizer is lost, as these calls have options of their own."""
    strategy = strategy_of(mesh)
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"remapping": False})
    try:
        step = tf.function(lambda: strategy.run(lambda: tf.constant(1.0)))
        graph = step.get_concrete_function().graph
        outside = tf.function(tf.function(lambda: tf.constant(1.0))).get_concrete_function().graph
    finally:
        tf.config.optimizer.set_experimental_options({"remapping": True, **before})
    calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    assert len(calls) == 2
    for op in calls:
        options = _optimizer_options(op.node_def)
        assert options.disable_tfg_optimizer
        assert options.remapping == options.OFF
    (other,) = [op for op in outside.get_operations() if "PartitionedCall" in op.type]
    assert not _optimizer_options(other.node_def).disable_tfg_optimizer


def _optimizer_options(node):
    config = tf.compat.v1.ConfigProto.FromString(node.attr["config_proto"].s)
    return config.graph_options.rewrite_options


# --- what fails on one replica --------------------------------------------------------------------


def _refuse(x):
    if x > 2:
        raise ValueError("too large")
    return x


# The check of a user, and a text of its error.
CHECKS = {
    "assertion": (lambda x: tf.debugging.assert_less(x, 2.5, message="bad row"), "bad row"),
    "numbers": (
        lambda x: tf.debugging.check_numerics(tf.where(x > 2, np.nan, x), "bad"),
        "bad.*NaN",
    ),
    "Python": (lambda x: tf.py_function(_refuse, [x], x.dtype), "too large"),
}


@pytest.mark.parametrize("mesh", ["data4", "data2-fsdp2-tensor2"])
def test_an_error_of_one_replica_is_raised(mesh):
    """Fails if what waits for the replica that failed is raised in place of its error: on any
    replica, before or after the replicas have communicated."""
    strategy = strategy_of(mesh)

    def fn(x, name, late):
        seen = x + 0.0 * context().all_reduce("SUM", x) if late else x
        with tf.control_dependencies([CHECKS[name][0](seen)]):
            return x + context().all_reduce("SUM", tf.identity(seen))

    @tf.function(autograph=False)
    def step(x, name, late):
        return strategy.reduce("SUM", strategy.run(fn, (x, name, late)), axis=None)

    for name, late in (("assertion", False), ("numbers", True), ("Python", True)):
        # TensorFlow can use no collective of this process again that fails when it is first run.
        step(per_replica(strategy, lambda i: 1.0), name, late)
        for failing in range(4):
            values = per_replica(strategy, lambda i, failing=failing: 3.0 if i == failing else 1.0)
            with pytest.raises(tf.errors.InvalidArgumentError, match=CHECKS[name][1]):
                step(values, name, late)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: context().all_gather(x, axis=0),
        lambda x: collectives.all_reduce(x, "data"),
        lambda x: collectives.reduce_scatter(x, ("data", "fsdp")),
        lambda x: collectives.all_to_all(x, ("data", "tensor")),
        lambda x: collectives.broadcast(x, "fsdp"),
        lambda x: collectives.permute(x, "data"),
    ],
)
def test_unlike_shapes_are_an_error(call):
    """Fails if replicas wait for ever for each other's tensors of other shapes."""
    strategy = strategy_of("data2-fsdp2-tensor2")
    errors = []

    def fn(length):
        return call(tf.ones([4, length]))

    def run(lengths):
        strategy.run(fn, (per_replica(strategy, lambda i: lengths[i]),))

    def wait():
        try:
            run([1, 2, 3, 4])
        except tf.errors.InvalidArgumentError as error:
            errors.append(str(error))

    run([1, 1, 1, 1])
    # Not in this thread, which could not end.
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "needs tensors of one shape" in errors[0]
    assert re.search(r"\[4 [1-3]\]", errors[0])
