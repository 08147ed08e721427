"""Variables of a mesh: everybody sees full tensors, and every rank stores its part."""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.mesh import Mesh
from llmos_tf.sharding import (
    Layout,
    MetricVariable,
    SeedVariable,
    ShardedVariable,
    layout_of,
    local_slice,
)
from llmos_tf.strategies import MeshStrategy

EVERYWHERE = ("data", "fsdp", "tensor")
# Neither 2 nor 4 divides the 5 inputs, the 15 elements of the last kernel or its 3 biases.
TABLE = {
    ".*/hidden/kernel": (None, "tensor"),
    ".*/hidden/bias": ("tensor",),
    ".*/output/kernel": Layout(("tensor", None), uneven=True),
}
MESHES = {
    "data2": (Mesh(data=2), {}),
    "data2-zero1": (Mesh(data=2), {"zero_stage": 1}),
    "data2-zero2": (Mesh(data=2), {"zero_stage": 2}),
    "fsdp2-zero3": (Mesh(fsdp=2), {"zero_stage": 3}),
    "fsdp4": (Mesh(fsdp=4), {}),
    "tensor2": (Mesh(tensor=2), {"layout_map": TABLE}),
    "fsdp2-tensor2": (Mesh(fsdp=2, tensor=2), {"layout_map": TABLE}),
    "data2-fsdp2-tensor2-zero1": (
        Mesh(data=2, fsdp=2, tensor=2),
        {"layout_map": TABLE, "zero_stage": 1},
    ),
}
# One of each kind.
SOME = ("data2", "fsdp4", "tensor2", "fsdp2-tensor2", "data2-fsdp2-tensor2-zero1")
# What a rank stores of each variable of the model, and of the optimizer's state for it.
STORED = {
    "data2": [((5, 6), (5, 6)), ((6,), (6,)), ((6, 3), (6, 3)), ((3,), (3,))],
    "data2-zero1": [((5, 6), (15,)), ((6,), (3,)), ((6, 3), (9,)), ((3,), (2,))],
    "data2-zero2": [((5, 6), (15,)), ((6,), (3,)), ((6, 3), (9,)), ((3,), (2,))],
    "fsdp2-zero3": [((15,), (15,)), ((3,), (3,)), ((9,), (9,)), ((2,), (2,))],
    "fsdp4": [((8,), (8,)), ((2,), (2,)), ((5,), (5,)), ((1,), (1,))],
    "tensor2": [((5, 3), (5, 3)), ((3,), (3,)), ((3, 3), (3, 3)), ((3,), (3,))],
    "fsdp2-tensor2": [((8,), (8,)), ((2,), (2,)), ((5,), (5,)), ((2,), (2,))],
    "data2-fsdp2-tensor2-zero1": [((8,), (4,)), ((2,), (1,)), ((5,), (3,)), ((2,), (1,))],
}


@functools.cache
def strategy_of(mesh):
    axes, options = MESHES[mesh]
    strategy = MeshStrategy(axes, **options)
    with strategy.scope():
        # Its rules have to match something, also where a test makes variables of its own only.
        make_model()
    return strategy


def make_model(seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, name="hidden", bias_initializer="normal"),
            keras.layers.Dropout(0.5, seed=3, name="dropout"),
            keras.layers.Dense(3, name="output", bias_initializer="normal"),
        ],
        name="model",
    )
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def on_mesh(mesh, seed=0):
    with strategy_of(mesh).scope():
        return make_model(seed)


def state_of(model):
    """All values that a checkpoint has, in order."""
    return [variable.numpy() for variable in [*model.variables, *model.optimizer.variables]]


def fill(model, start=0):
    """Gives every weight and optimizer variable numbers of its own."""
    for variable in [*model.trainable_variables, *model.optimizer.variables]:
        size = int(np.prod(variable.shape))
        numbers = np.arange(start, start + size).reshape(variable.shape)
        variable.assign(numbers.astype(variable.dtype))
        start += size


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def stored(variable):
    """The components of a Keras variable."""
    return variable._value.values


def of_every_rank(x):
    return collectives.all_gather(x[tf.newaxis], EVERYWHERE)


def run(strategy, program, *args):
    """What the first rank returns, as arrays."""
    results = strategy.run(program, args)
    first = strategy.experimental_local_results
    return tf.nest.map_structure(lambda value: first(value)[0].numpy(), results)


# --- what is stored, and what is seen -------------------------------------------------------------


@pytest.mark.parametrize("mesh", SOME)
def test_initial_values_are_those_of_one_device(mesh):
    """Catches an initializer that is run for each part, in another order or for its shape."""
    assert_same(state_of(on_mesh(mesh, seed=5)), state_of(make_model(seed=5)))


@pytest.mark.parametrize("mesh", MESHES)
def test_every_rank_stores_its_part_only(mesh):
    """Catches a full copy on a device, or an optimizer state that is not cut with its variable."""
    strategy, model = strategy_of(mesh), on_mesh(mesh)
    fill(model)
    slots = {}
    for slot in model.optimizer.variables[2:]:
        slots.setdefault(slot.path.split("/")[-1].rsplit("_", 1)[0], []).append(slot)
    variables = model.trainable_variables
    assert all(len(found) == 2 for found in slots.values())
    pairs = zip(variables, slots.values(), STORED[mesh], strict=True)
    for variable, its_slots, (part, update_part) in pairs:
        assert isinstance(variable._value, ShardedVariable)
        for owner, shape in [(variable, part), *((slot, update_part) for slot in its_slots)]:
            layout, full = owner._value.layout, tf.constant(owner.numpy())
            assert layout.part_shape(tuple(owner.shape), strategy.mesh) == shape
            for rank, component in enumerate(stored(owner)):
                assert component.device == strategy.mesh.devices[rank]
                assert component.shape == shape
                expected = layout.part_of(full, strategy.mesh, rank)
                np.testing.assert_array_equal(component, expected)


def test_no_device_has_a_full_copy_while_variables_are_made():
    """Catches a full initial value that is made on an accelerator before it is cut."""
    made_on = []

    def initializer(shape, dtype):
        value = tf.zeros(shape, dtype)
        made_on.append(tf.DeviceSpec.from_string(value.device).device_index)
        return value

    devices = [f"CPU:{i}" for i in range(1, 5)]
    with MeshStrategy(Mesh(fsdp=4, devices=devices)).scope():
        variable = keras.Variable(initializer, (5, 6))
    assert made_on == [0]
    assert [tf.DeviceSpec.from_string(c.device).device_index for c in stored(variable)] == [
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize("mesh", SOME)
def test_full_values_are_written_and_read(mesh):
    """Catches parts that are joined in another order than they were cut."""
    strategy = strategy_of(mesh)
    model, one = on_mesh(mesh), make_model()
    fill(one, start=100)
    model.set_weights(one.get_weights())
    assert_same(model.get_weights(), one.get_weights())
    for variable in model.trainable_variables:
        value = np.random.default_rng(0).integers(-9, 9, variable.shape).astype("float32")
        variable.assign(value)
        variable.assign_add(2 * value)
        variable.assign_sub(value + 1)
        np.testing.assert_array_equal(variable.numpy(), 2 * value - 1)
        inner = variable._value
        np.testing.assert_array_equal(inner.numpy(), 2 * value - 1)
        np.testing.assert_array_equal(tf.convert_to_tensor(inner) + inner, 4 * value - 2)
        np.testing.assert_array_equal(inner[-1], 2 * value[-1] - 1)
        np.testing.assert_array_equal(tf.gather(inner, [1, 0]), 2 * value[[1, 0]] - 1)
        assert inner.shape == inner.get_shape() == value.shape
        graph = tf.function(lambda inner=inner: inner.assign_add(tf.ones(inner.shape)).read_value())
        np.testing.assert_array_equal(graph(), 2 * value)
        np.testing.assert_array_equal(inner.read_value(), 2 * value)
    assert len(stored(model.weights[0])) == strategy.mesh.size


def test_rows_are_scattered():
    """Catches a sparse update that writes row numbers of the whole into a part, or never ends."""
    with strategy_of("fsdp4").scope():
        variable = tf.Variable(np.zeros((5, 2)), name="table")
    rows = tf.IndexedSlices(tf.constant([[1.0, 2], [3, 4], [5, 6]], tf.float64), [4, 0, 4])
    variable.scatter_add(rows)
    np.testing.assert_array_equal(variable, [[3, 4], [0, 0], [0, 0], [0, 0], [6, 8]])
    variable.scatter_sub(rows)
    np.testing.assert_array_equal(variable, np.zeros((5, 2)))
    update = tf.IndexedSlices(tf.constant([[7.0, 8]], tf.float64), [3])
    strategy_of("fsdp4").run(lambda: variable.scatter_update(update))
    variable.scatter_update(tf.IndexedSlices(tf.constant([[9.0, 9]], tf.float64), [1]))
    np.testing.assert_array_equal(variable, [[0, 0], [9, 9], [0, 0], [7, 8], [0, 0]])
    with pytest.raises(NotImplementedError, match="variable table of a mesh takes assign"):
        variable.scatter_max(rows)
    with pytest.raises(NotImplementedError, match="variable table of a mesh takes assign"):
        strategy_of("fsdp4").run(lambda: variable.scatter_max(rows))


# --- saving and loading ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("data2", "fsdp2-tensor2"),
        ("data2-zero1", "tensor2"),
        ("data2-zero2", None),
        ("fsdp2-zero3", "data2"),
        ("fsdp4", "data2-zero2"),
        ("tensor2", "fsdp4"),
        ("fsdp2-tensor2", "data2-zero1"),
        ("data2-fsdp2-tensor2-zero1", "fsdp2-zero3"),
        (None, "data2-fsdp2-tensor2-zero1"),
    ],
)
def test_files_have_full_tensors(source, target, tmp_path):
    """Catches a file with parts in it, or one that only the mesh that wrote it can read."""
    make = {name: (lambda n=name: on_mesh(n, seed=1)) for name in MESHES} | {None: make_model}
    model = make[source]()
    fill(model)
    expected = state_of(model)

    model.save(tmp_path / "model.keras")
    if target is None:
        loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        with strategy_of(target).scope():
            loaded = keras.models.load_model(tmp_path / "model.keras")
        assert all(isinstance(v._value, ShardedVariable) for v in loaded.trainable_variables)
        assert loaded.weights[0]._value.mesh == strategy_of(target).mesh
    assert_same(state_of(loaded), expected)

    model.save_weights(tmp_path / "w.weights.h5")
    other = make[target]()
    other.load_weights(tmp_path / "w.weights.h5")
    assert_same(other.get_weights(), model.get_weights())

    tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    third = make[target]()
    status = tf.train.Checkpoint(model=third).read(str(tmp_path / "checkpoint"))
    status.assert_existing_objects_matched()
    assert_same(state_of(third), expected)


# --- in a program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw():
    """Plain variables on fsdp2-tensor2: cut both ways, unevenly, flat only, and not at all."""
    strategy = MeshStrategy(
        Mesh(fsdp=2, tensor=2),
        layout_map={
            "columns": (None, "tensor"),
            "vocabulary": Layout(("tensor", None), uneven=True),
        },
    )
    rng = np.random.default_rng(0)
    shapes = {"columns": (3, 6), "vocabulary": (5, 3), "bias": (5,), "scale": ()}
    values = {name: rng.integers(-9, 10, shape) * 1.0 for name, shape in shapes.items()}
    with strategy.scope():
        variables = {name: tf.Variable(value, name=name) for name, value in values.items()}
    return strategy, variables, values


def test_a_program_reads_the_whole_and_its_gradient_goes_to_the_parts(raw):
    """Catches a read of a part, or a gradient that has not the rows' sum or not the own slice.

    Ranks that differ on fsdp have other rows, so their gradients add up (a scalar is not cut, and
    the step sums its gradient); ranks that differ on tensor compute the same.
    """
    strategy, variables, values = raw
    upstreams = {
        name: np.random.default_rng(1).integers(-9, 10, (2, *value.shape)) * 1.0
        for name, value in values.items()
    }
    tensors = {name: tf.constant(value) for name, value in upstreams.items()}

    def program():
        rank = collectives.axis_index("fsdp")
        found = {}
        with tf.GradientTape() as tape:
            reads = {name: v.read_value() for name, v in variables.items()}
            sums = [tf.reduce_sum(reads[name] * up[rank]) for name, up in tensors.items()]
            loss = tf.add_n(sums)
        gradients = tape.gradient(loss, list(variables.values()))
        for name, gradient in zip(variables, gradients, strict=True):
            inner = variables[name]
            expected_layout = None if name == "scale" else inner.layout
            assert layout_of(inner) == expected_layout
            assert gradient.shape == inner.values[0].shape == inner.part().shape
            found[name] = {
                "read": reads[name],
                "twice": inner * 2.0,
                "part": inner.part(),
                "slice": local_slice(inner),
                "gradient": gradient,
            }
        return tf.nest.map_structure(of_every_rank, found)

    results = run(strategy, program)
    for name, variable in variables.items():
        value, layout, mesh = values[name], variable.layout, strategy.mesh
        for rank in range(mesh.size):
            seen = {key: array[rank] for key, array in results[name].items()}
            np.testing.assert_array_equal(seen["read"], value)
            np.testing.assert_array_equal(seen["twice"], 2 * value)
            np.testing.assert_array_equal(seen["part"], variable.values[rank])
            sliced = Layout(layout.dims, (), layout.uneven)
            np.testing.assert_array_equal(seen["slice"], sliced.part_of(value, mesh, rank))
            rows = mesh.coordinate(rank)["fsdp"]
            total = upstreams[name].sum(0) if layout.flat else upstreams[name][rows]
            expected = layout.part_of(tf.constant(total), mesh, rank)
            np.testing.assert_array_equal(seen["gradient"], expected)
    assert variables["vocabulary"].values[0].shape == (5,)  # 3 rows of 3, cut in two


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("SUM", 3.0), ("MEAN", 1.5), ("ONLY_FIRST_REPLICA", 1.0)],
)
def test_replicas_that_assign_other_values_are_aggregated(aggregation, expected):
    """Catches an aggregation over ranks that have the same rows, or none at all."""
    strategy = strategy_of("fsdp2-tensor2")
    with strategy.scope():
        variable = tf.Variable(
            [0.0, 1, 2], name="v", aggregation=getattr(tf.VariableAggregation, aggregation)
        )

    def program(change):
        index = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.float32)
        getattr(variable, change)((index + 1) * tf.ones(3))
        return variable.read_value()

    # What a program reads after it assigned is the new value.
    assert run(strategy, program, "assign").tolist() == [expected] * 3
    assert run(strategy, program, "assign_add").tolist() == [2 * expected] * 3
    assert run(strategy, program, "assign_sub").tolist() == [expected] * 3
    assert variable.numpy().tolist() == [expected] * 3


def test_a_program_assigns_full_tensors(raw):
    """Catches a full tensor that is written into a part, or into the parts of rank 0 only."""
    strategy, variables, values = raw

    def program():
        for name, variable in variables.items():
            variable.assign(10 * values[name])
            variable.assign_add(values[name])
            variable.assign_sub(tf.ones(variable.shape, tf.float64))
        return [variable.read_value() for variable in variables.values()]

    results = run(strategy, program)
    for (name, variable), result in zip(variables.items(), results, strict=True):
        np.testing.assert_array_equal(result, 11 * values[name] - 1)
        np.testing.assert_array_equal(variable, 11 * values[name] - 1)
        for rank, component in enumerate(variable.values):
            part = variable.layout.part_of(11 * values[name] - 1, strategy.mesh, rank)
            np.testing.assert_array_equal(component, part)
        variable.assign(values[name])


# --- misuse ---------------------------------------------------------------------------------------


def test_a_value_of_another_shape_is_refused(raw):
    """Catches a value that is broadcast, cut to size or written into a part unseen."""
    strategy, variables, _ = raw
    columns = variables["columns"]
    message = re.escape("variable columns has the shape (3, 6). Received: a value of shape")
    for shape in [(3, 3), (9,), (6,), ()]:
        for change in ("assign", "assign_add", "assign_sub"):
            with pytest.raises(ValueError, match=message):
                getattr(columns, change)(tf.zeros(shape, tf.float64))
            with pytest.raises(ValueError, match=message):
                strategy.run(lambda c=change, s=shape: getattr(columns, c)(tf.zeros(s, tf.float64)))


def test_a_variable_from_outside_the_scope_is_refused():
    """Catches an update of one device's variable, or of another mesh's, that looks like success."""
    strategy = strategy_of("data2")
    outside = keras.Variable(np.ones(3), name="outside")
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.1)
    with pytest.raises(ValueError, match="outside:0 was made outside the strategy's scope"):
        strategy.run(lambda: optimizer.apply([tf.ones(3)], [outside]))
    with strategy_of("fsdp4").scope():
        other = tf.Variable([1.0, 2, 3], name="other")
    with pytest.raises(ValueError, match="other:0 was made under the scope of another strategy"):
        strategy.run(lambda: other + 1)


# --- seeds and metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["data2", "tensor2", "fsdp2-tensor2"])
def test_seeds_differ_where_rows_do(mesh):
    """Catches one mask for all rows, another for the same rows, or a state that is not one's own.

    The user sees the state of one device, before and after it was used.
    """
    strategy = strategy_of(mesh)
    one = keras.random.SeedGenerator(7)
    with strategy.scope():
        generator = keras.random.SeedGenerator(7)
    assert isinstance(generator.state._value, SeedVariable)
    np.testing.assert_array_equal(generator.state, one.state)

    def program():
        # Two uses, each of which advances the state.
        drawn = [keras.random.uniform((4,), seed=generator) for _ in range(2)]
        return of_every_rank(tf.concat(drawn, 0))

    def expected():
        return np.concatenate([keras.random.uniform((4,), seed=one) for _ in range(2)])

    for _ in range(2):
        drawn, first = run(strategy, program), expected()
        np.testing.assert_array_equal(drawn[0], first)
        np.testing.assert_array_equal(generator.state, one.state)
        for a in range(strategy.mesh.size):
            for b in range(a):
                rows = [strategy.mesh.index_along(rank, ("data", "fsdp")) for rank in (a, b)]
                assert np.array_equal(drawn[a], drawn[b]) == (rows[0] == rows[1])
    # As a checkpoint restores it.
    generator.state.assign([11, 5])
    one.state.assign([11, 5])
    np.testing.assert_array_equal(generator.state, [11, 5])
    np.testing.assert_array_equal(run(strategy, program)[0], expected())


@pytest.mark.parametrize("mesh", ["data2", "tensor2", "data2-fsdp2-tensor2-zero1"])
def test_metrics_count_every_row_once(mesh):
    """Catches rows that are counted by each rank of a tensor axis, or by the first rank only."""
    strategy = strategy_of(mesh)
    with strategy.scope():
        metric = keras.metrics.Mean()
    assert all(isinstance(v._value, MetricVariable) for v in metric.variables)
    values = np.random.default_rng(0).integers(0, 9, 7) * 1.0
    batches = strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices(values).batch(4)
    )
    for batch in batches:
        strategy.run(metric.update_state, args=(batch,))
    total, count = metric.variables
    assert (float(total.numpy()), float(count.numpy())) == (values.sum(), 7)
    assert float(metric.result()) == pytest.approx(values.mean())
    total.assign(12.0)
    count.assign(3.0)
    assert (float(total.numpy()), float(metric.result())) == (12, 4)
    metric.reset_state()
    assert (float(total.numpy()), float(count.numpy())) == (0, 0)
