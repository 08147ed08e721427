"""Strategies: their options, and what `tf.distribute` promises of any strategy."""

import contextlib
import functools
import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import (
    DataParallelStrategy,
    MeshStrategy,
    PipelineParallelStrategy,
    TensorParallelStrategy,
    ZeroStrategy,
)
from llmos_tf.strategies.engine import MAX_EAGER_FUNCTIONS

TABLE = {".*/hidden/kernel": (None, "tensor")}
MESHES = {
    "one": (Mesh(), {}),
    "data2": (Mesh(data=2), {}),
    "data4": (Mesh(data=4), {"zero_stage": 1}),
    "tensor2": (Mesh(tensor=2), {"layout_map": TABLE}),
    "data2-fsdp2-tensor2": (Mesh(data=2, fsdp=2, tensor=2), {"layout_map": TABLE}),
}
# For training, which takes longer on eight devices.
MESHES_OF_4 = {"fsdp2-tensor2": (Mesh(fsdp=2, tensor=2), {"layout_map": TABLE})}


@functools.cache
def strategy_of(mesh):
    axes, options = (MESHES | MESHES_OF_4)[mesh]
    strategy = MeshStrategy(axes, **options)
    with strategy.scope():
        # Its rules have to match something, also where a test makes variables of its own only.
        make_model()
    return strategy


def local(strategy, value):
    return [np.array(v).tolist() for v in strategy.experimental_local_results(value)]


def context():
    return tf.distribute.get_replica_context()


def replica_id():
    return tf.cast(context().replica_id_in_sync_group, tf.float32)


def per_replica(strategy, function=lambda i: float(i + 1)):
    """A value for each replica: 1, 2, …"""
    return strategy.experimental_distribute_values_from_function(
        lambda c: tf.constant(function(c.replica_id_in_sync_group))
    )


# --- the classes and their options ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sizes", "replicas"),
    [
        (lambda: MeshStrategy(Mesh()), {}, 1),
        (lambda: DataParallelStrategy(), {"data": 8}, 8),
        (lambda: DataParallelStrategy(["CPU:2", "/cpu:0"]), {"data": 2}, 2),
        (lambda: ZeroStrategy(1), {"data": 8}, 8),
        (lambda: ZeroStrategy(2, ["CPU:1"]), {}, 1),
        (lambda: ZeroStrategy(3, ["CPU:0", "CPU:1"]), {"fsdp": 2}, 2),
        (lambda: TensorParallelStrategy(), {"tensor": 8}, 1),
        (lambda: TensorParallelStrategy(["CPU:4"], sequence_parallel=True), {}, 1),
        (lambda: MeshStrategy(Mesh(data=2, fsdp=2, tensor=2)), {"data": 2, "fsdp": 2}, 4),
    ],
)
def test_the_classes(make, sizes, replicas):
    """Catches a class whose devices lie on another axis, or that counts ranks as replicas."""
    strategy = make()
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert isinstance(strategy, MeshStrategy)
    assert strategy.mesh.sizes.items() >= sizes.items()
    assert strategy.mesh.batch_ways == strategy.num_replicas_in_sync == replicas


def test_devices_keep_their_order_and_get_full_names():
    """Catches a rank on another device than the user's list says."""
    prefix = "/job:localhost/replica:0/task:0/device:CPU"
    names = ["CPU:5", "/cpu:2", "/device:CPU:7", f"{prefix}:1"]
    strategy = DataParallelStrategy(names)
    assert strategy.mesh.devices == tuple(f"{prefix}:{i}" for i in (5, 2, 7, 1))
    assert strategy.extended.worker_devices == strategy.mesh.devices
    with strategy.scope():
        variable = tf.Variable(0.0)
    assert tuple(c.device for c in variable.values) == strategy.mesh.devices
    default = MeshStrategy(Mesh(data=2)).mesh.devices
    assert default == (f"{prefix}:0", f"{prefix}:1")


@pytest.mark.parametrize(
    "make",
    [
        DataParallelStrategy,
        functools.partial(ZeroStrategy, 1),
        TensorParallelStrategy,
        PipelineParallelStrategy,
    ],
)
def test_every_strategy_takes_the_options_of_a_mesh(make):
    """Fails if an option is known to MeshStrategy only, or is taken and forgotten."""
    strategy = make(devices=["CPU:0", "CPU:1"], rematerialise="block")
    assert strategy.extended.options.rematerialise == "block"
    with pytest.raises(TypeError, match="rematerialize"):
        make(devices=["CPU:0", "CPU:1"], rematerialize="block")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MeshStrategy("data=2"), "takes an llmos_tf.Mesh, such as Mesh(data=2)"),
        (lambda: MeshStrategy(Mesh(data=9)), "needs 9 devices; 8 CPU devices are visible"),
        (lambda: MeshStrategy(Mesh(devices=["CPU:8"])), "There is no device 'CPU:8'"),
        (lambda: DataParallelStrategy(["CPU:0", "CPU:0"]), "in a mesh only once"),
        (lambda: DataParallelStrategy(["CPU:1", "/cpu:1"]), "in a mesh only once"),
        (lambda: DataParallelStrategy([]), "Received: data=0"),
        (lambda: MeshStrategy(Mesh(data=2), zero_stage=4), "zero_stage is 0, 1, 2 or 3"),
        (lambda: MeshStrategy(Mesh(fsdp=2), zero_stage=1), "along the data axis"),
        (lambda: MeshStrategy(Mesh(tensor=2), zero_stage=2), "in the mesh tensor=2"),
        (lambda: MeshStrategy(Mesh(data=2), zero_stage=3), "Mesh(fsdp=...)"),
        (lambda: ZeroStrategy(0), "stage 0 is DataParallelStrategy"),
        (lambda: ZeroStrategy(4), "Received: stage=4"),
        (lambda: MeshStrategy(Mesh(data=2), sequence_parallel=True), "Give a tensor axis"),
    ],
)
def test_a_misuse_is_named(make, named):
    """Catches an option that is ignored, or that fails deep inside TensorFlow."""
    with pytest.raises(ValueError, match=r"Received|visible|in the mesh|only once") as error:
        make()
    assert named in str(error.value)


def test_devices_in_any_order():
    """Catches members of a group in the order of their devices' names and not of the mesh.

    TensorFlow orders them so: by number, CPU:2 before CPU:10.
    """
    strategy = MeshStrategy(Mesh(data=2, tensor=2, devices=["CPU:3", "CPU:1", "CPU:0", "CPU:2"]))
    everywhere = ("data", "tensor")

    def program():
        rank = collectives.axis_index(everywhere)
        parts = 10 * rank + tf.range(4)
        found = {
            "gather": collectives.all_gather(rank[tf.newaxis], everywhere),
            "along tensor": collectives.all_gather(rank[tf.newaxis], "tensor"),
            "exchange": collectives.all_to_all(parts, everywhere),
            "scatter": collectives.reduce_scatter(parts, everywhere),
            "permute": collectives.permute(rank[tf.newaxis], everywhere),
            "broadcast": collectives.broadcast(rank[tf.newaxis], everywhere, root=1),
        }
        return {k: collectives.all_gather(v[tf.newaxis], everywhere) for k, v in found.items()}

    results = {k: local(strategy, v)[0] for k, v in strategy.run(program).items()}
    assert results == {
        "gather": [[0, 1, 2, 3]] * 4,
        "along tensor": [[0, 1], [0, 1], [2, 3], [2, 3]],
        "exchange": [[j, 10 + j, 20 + j, 30 + j] for j in range(4)],
        "scatter": [[60 + 4 * j] for j in range(4)],
        "permute": [[3], [0], [1], [2]],
        "broadcast": [[1]] * 4,
    }


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


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_a_distributed_dataset_has_every_row_once(mesh):
    """Catches rows that are lost, doubled or moved, most of all in a batch that is uneven."""
    strategy = strategy_of(mesh)
    numbers = tf.range(13)
    elements = {"x": numbers, "y": (10 * numbers, tf.strings.as_string(numbers))}
    rows = tf.data.Dataset.from_tensor_slices(elements)
    # 12 rows in batches of a length that is static, and 13 in others.
    for batch, count in [(3, 12), (1, 13), (3, 13), (4, 13), (8, 13)]:
        batches = rows.take(count).batch(batch, drop_remainder=count == 12)
        dataset = strategy.experimental_distribute_dataset(batches)
        assert isinstance(dataset, tf.distribute.DistributedDataset)
        assert len(dataset) == int(dataset.cardinality) == -(-count // batch)
        # Twice, as in two epochs.
        for _ in range(2):
            seen = []
            for element in dataset:
                parts = local(strategy, element["x"])
                lengths = [len(part) for part in parts]
                assert len(parts) == strategy.num_replicas_in_sync
                assert max(lengths) - min(lengths) <= 1
                assert local(strategy, element["y"][0]) == [[10 * i for i in p] for p in parts]
                texts = [[str(i).encode() for i in p] for p in parts]
                assert local(strategy, element["y"][1]) == texts
                seen.append([i for part in parts for i in part])
            assert [i for row in seen for i in row] == list(range(count))
            assert {len(row) for row in seen[:-1]} == {batch}


def sum_by_loops(strategy, dataset):
    """The sum of all rows, by every way to loop over a distributed dataset."""

    def one(element):
        rows = strategy.run(tf.reduce_sum, args=(element,))
        return strategy.reduce("SUM", rows, axis=None)

    @tf.function
    def over_dataset():
        total = tf.constant(0, tf.int64)
        for element in dataset:
            total += one(element)
        return total

    @tf.function
    def over_iterator(iterator):
        total = tf.constant(0, tf.int64)
        for element in iterator:
            total += one(element)
        return total

    steps = len(dataset)

    @tf.function
    def counted(iterator):
        total = tf.constant(0, tf.int64)
        for _ in tf.range(steps):
            total += one(next(iterator))
        return total

    @tf.function(input_signature=[dataset.element_spec])
    def step(element):
        return one(element)

    def optionals():
        iterator, total = iter(dataset), 0
        while (element := iterator.get_next_as_optional()).has_value():
            total += one(element.get_value())
        return total

    sums = {
        "over_dataset": over_dataset(),
        "over_iterator": over_iterator(iter(dataset)),
        "counted": counted(iter(dataset)),
        "step": sum(step(element) for element in dataset),
        "optionals": optionals(),
        "reduce": dataset.reduce(tf.constant(0, tf.int64), lambda s, element: s + one(element)),
    }
    assert step.experimental_get_tracing_count() == 1
    return {name: int(value) for name, value in sums.items()}


@pytest.mark.parametrize("mesh", ["one", "data4", "tensor2"])
def test_ways_to_loop_over_a_distributed_dataset(mesh):
    """Catches a loop that ends early, never, or leaves out the rows of a last, smaller batch."""
    strategy = strategy_of(mesh)
    batches = tf.data.Dataset.range(1, 15).batch(4)
    for dataset in (
        strategy.experimental_distribute_dataset(batches),
        strategy.distribute_datasets_from_function(lambda _: tf.data.Dataset.range(1, 15).batch(1)),
    ):
        assert isinstance(iter(dataset), tf.distribute.DistributedIterator)
        assert set(sum_by_loops(strategy, dataset).values()) == {sum(range(1, 15))}


def test_an_iterator_made_in_a_tf_function_is_refused():
    """Catches a Python loop while it is traced, which would never end."""
    strategy = strategy_of("data2")
    dataset = strategy.experimental_distribute_dataset(tf.data.Dataset.range(4).batch(2))

    @tf.function(autograph=False)
    def loop():
        return list(dataset)

    with pytest.raises(RuntimeError, match="make the iterator outside"):
        loop()


@pytest.mark.parametrize("mesh", MESHES)
def test_a_dataset_from_a_function_deals_batches_to_replicas(mesh):
    """Catches batches that go to ranks in place of replicas, or last ones that are lost."""
    strategy = strategy_of(mesh)
    n = strategy.num_replicas_in_sync
    contexts = []

    def dataset_fn(context):
        contexts.append(context)
        size = context.get_per_replica_batch_size(2 * n)
        rows = tf.data.Dataset.range(11).shard(context.num_input_pipelines, 0)
        return rows.map(lambda i: (i, {"y": [i, -i]})).batch(size)

    dataset = strategy.distribute_datasets_from_function(dataset_fn)
    assert [(c.num_input_pipelines, c.input_pipeline_id) for c in contexts] == [(1, 0)]
    assert contexts[0].num_replicas_in_sync == n
    batches = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    batches += [[]] * (-len(batches) % n)
    seen = [(local(strategy, x), local(strategy, y["y"])) for x, y in dataset]
    assert {len(parts) for step in seen for parts in step} == {n}
    assert [part for x, _ in seen for part in x] == batches
    assert [part for _, y in seen for part in y] == [[[i, -i] for i in b] for b in batches]


def test_a_dataset_from_a_function_must_be_batched():
    """Catches single rows, which would reach the replicas without their first dimension."""
    with pytest.raises(ValueError, match="returns a dataset of batches"):
        strategy_of("data2").distribute_datasets_from_function(lambda _: tf.data.Dataset.range(4))


# --- training -------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(22, 4))
Y = np.random.default_rng(1).normal(size=(22, 2))
# float64: sums in another order differ by 1e-16, which Adam's root of tiny moments magnifies.
TOLERANCE = 1e-10


def make_model():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(6, activation="tanh", name="hidden"),
        keras.layers.Dense(2, name="output"),
    ]
    model = keras.Sequential(layers, name="model")
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


def on(strategy):
    with strategy.scope():
        return make_model()


def fit(model, rows=16, **options):
    """Trains for two epochs; returns the weights."""
    options = {"epochs": 2, "shuffle": False, "verbose": 0, "batch_size": 8} | options
    model.fit(X[:rows], Y[:rows], **options)
    return model.get_weights()


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [("data2", 16), ("data2", 22), ("tensor2", 22), ("fsdp2-tensor2", 22)],
)
def test_fit_traces_one_program(float64, mesh, rows):
    """Catches a program that is traced once a device, once a step, or again for the last batch.

    Keras gives the batches of 16 rows a static length, and those of 22 rows, of which the last has
    6, an unknown one; so in either case one program does for all of them. Evaluation is another.
    """
    model = make_model()
    expected = [fit(model, rows), fit(model, rows)]
    axes, options = (MESHES | MESHES_OF_4)[mesh]
    strategy = MeshStrategy(axes, **options)
    model = on(strategy)
    for weights in expected:
        assert_close(fit(model, rows), weights)
        assert strategy.num_traces == 1
    for _ in range(2):
        model.evaluate(X[:rows], Y[:rows], batch_size=8, verbose=0)
        assert strategy.num_traces == 2


def test_steps_in_a_python_loop_trace_once():
    """Catches a function that is traced at each eager call, or kept for ever when it is new."""
    strategy = MeshStrategy(Mesh(data=2))
    with strategy.scope():
        variable = tf.Variable(0.0, aggregation=tf.VariableAggregation.SUM)

    def step(x):
        variable.assign_add(x)

    for i in range(5):
        strategy.run(step, (tf.constant(float(i)),))
    assert float(variable.numpy()) == 20
    assert strategy.num_traces == 1

    class Owner:
        pass

    owner = Owner()
    reference = weakref.ref(owner)
    strategy.run(lambda owner=owner: None)
    del owner
    for _ in range(MAX_EAGER_FUNCTIONS):
        strategy.run(lambda: None)
        # In use all the time, so it stays.
        strategy.run(step, (tf.constant(1.0),))
    gc.collect()
    assert reference() is None
    assert strategy.num_traces == 2 + MAX_EAGER_FUNCTIONS


def test_strategies_of_different_sizes_train_in_turn(float64):
    """Catches groups of two strategies that TensorFlow takes for one (DESIGN: fact 9)."""
    model = make_model()
    expected = [fit(model), fit(model)]
    models = [on(strategy_of(mesh)) for mesh in ("data2", "data4", "tensor2")]
    for weights in expected:
        for model in models:
            assert_close(fit(model), weights)


def custom_loop(strategy, run_loop):
    """The loop of TensorFlow's own tutorials; returns the weights and the sum of the losses."""
    with strategy.scope():
        model = make_model()
        optimizer = keras.optimizers.Adam(0.01)
        loss_object = keras.losses.MeanSquaredError(reduction="none")

    def train_step(x, y):
        with tf.GradientTape() as tape:
            per_example = loss_object(y, model(x, training=True))
            loss = tf.nn.compute_average_loss(per_example, global_batch_size=8)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def distributed_train_step(x, y):
        losses = strategy.run(train_step, args=(x, y))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    # 8, 8 and 6 rows.
    dataset = strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    )
    total = run_loop(dataset, distributed_train_step)
    return model.get_weights(), float(total)


def eager_loop(dataset, step):
    return sum(step(x, y) for x, y in dataset)


def graph_loop(dataset, step):
    @tf.function
    def epoch():
        total = tf.constant(0.0, tf.float64)
        for x, y in dataset:
            total += step(x, y)
        return total

    return epoch()


@pytest.mark.parametrize("loop", [eager_loop, graph_loop])
@pytest.mark.parametrize("mesh", ["data2", "fsdp2-tensor2"])
def test_a_custom_training_loop(float64, mesh, loop):
    """Catches a loop of the tutorials that has other weights or losses than one device."""
    expected, expected_loss = custom_loop(tf.distribute.get_strategy(), eager_loop)
    weights, loss = custom_loop(strategy_of(mesh), loop)
    assert_close(weights, expected)
    assert loss == pytest.approx(expected_loss, abs=TOLERANCE)


def test_fit_takes_booleans(float64):
    """Fails if what Keras builds a model on, a mean of the first batch, stops at a mask."""

    class Masked(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, inputs):
            return self.dense(keras.ops.where(inputs["mask"], inputs["x"], 0.0))

    rng = np.random.default_rng(0)
    x = {"x": rng.normal(size=(7, 3)), "mask": rng.integers(0, 2, (7, 3)) > 0}
    weights = []
    for strategy in (None, strategy_of("data2")):
        keras.utils.set_random_seed(0)
        with strategy.scope() if strategy is not None else contextlib.nullcontext():
            model = Masked()
            model.compile("sgd", "mse")
        model.fit(x, x["x"][:, :2], batch_size=4, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for one, other in zip(*weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("mesh", ["data4", "fsdp2-tensor2"])
def test_fit_takes_distributed_datasets(float64, mesh):
    """Catches a distributed dataset that fit splits again, or whose replicas' batches it mixes.

    A function's dataset gives each replica a batch, so here the replicas' batches of 8/n rows make
    those of 8 rows. The last ones leave some replicas without.
    """
    expected = fit(make_model(), rows=22)
    strategy = strategy_of(mesh)
    rows = tf.data.Dataset.from_tensor_slices((X, Y))
    for dataset in (
        strategy.experimental_distribute_dataset(rows.batch(8)),
        strategy.distribute_datasets_from_function(
            lambda context: rows.batch(context.get_per_replica_batch_size(8))
        ),
    ):
        model = on(strategy)
        model.fit(dataset, epochs=2, verbose=0)
        assert_close(model.get_weights(), expected)
