"""One of two processes that test what spans processes; `test_two_processes.py` starts it.

    python worker.py TASK PORT,PORT

Every process has two virtual CPU devices and runs the same program: the functions named check_*, in
order. Each compares with numpy, or with training on one device, and prints a line when it passed.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import faulthandler
import importlib.util
import itertools
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import Mesh, collectives, devices
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training import make_train_step

NUM_PROCESSES, NUM_DEVICES = 2, 2
NAMES = [
    [f"/job:worker/replica:0/task:{task}/device:CPU:{i}" for i in range(NUM_DEVICES)]
    for task in range(NUM_PROCESSES)
]
# The devices of a mesh in rank order: the first of two axes lies across processes, or the last.
FIRST_ACROSS = [*NAMES[0], *NAMES[1]]
LAST_ACROSS = [name for pair in zip(*NAMES, strict=True) for name in pair]
ROWS, LENGTH, VOCABULARY = 4, 4, 10


def load_collective_cases():
    """The cases of the one-process test: collectives, and what numpy says of them."""
    path = Path(__file__).resolve().parents[1] / "unit" / "collectives" / "test_functions.py"
    spec = importlib.util.spec_from_file_location("collective_cases", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["collective_cases"] = module
    spec.loader.exec_module(module)
    return module


def compare_collectives(names):
    cases = load_collective_cases()
    strategy = MeshStrategy(Mesh(data=2, tensor=2, devices=names))
    cases.MESH = strategy.mesh
    numbered = list(enumerate(cases.CASES))
    axis_sets = [("data",), ("tensor",), ("data", "tensor")]

    def program():
        found = {}
        for axes, (number, case) in itertools.product(axis_sets, numbered):
            table = cases.small_numbers([number, 0], cases.input_shape(axes))
            x = tf.constant(table)[cases.rank_of()]
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = case.call(x, axes)
            found[axes, case.name, "y"] = y
            if case.backward is not None:
                upstream = tf.constant(cases.small_numbers([number, 1], y.shape))
                found[axes, case.name, "gradient"] = tape.gradient(y, x, upstream[cases.rank_of()])
        return cases.of_every_rank(found)

    with cases.unoptimized():
        results = cases.run(strategy, program)
    for axes, (number, case) in itertools.product(axis_sets, numbered):
        table = cases.small_numbers([number, 0], cases.input_shape(axes))
        expected = cases.in_groups(case.forward, table, axes)
        seen = f"{case.name} along {axes}"
        np.testing.assert_array_equal(results[axes, case.name, "y"], expected, seen)
        if case.backward is not None:
            upstream = cases.small_numbers([number, 1], expected.shape[1:])
            expected = cases.in_groups(case.backward, upstream, axes)
            np.testing.assert_array_equal(results[axes, case.name, "gradient"], expected, seen)


def check_collectives_first_axis_across():
    """Catches a group, an order of its members or a gradient that is wrong across processes."""
    compare_collectives(FIRST_ACROSS)


def check_collectives_last_axis_across():
    """Catches members in the order of their devices' names, which the mesh does not follow here."""
    compare_collectives(LAST_ACROSS)


def build_model():
    keras.utils.set_random_seed(0)
    config = GPTConfig(
        vocab_size=VOCABULARY, max_positions=LENGTH, hidden_size=8, num_heads=2, num_layers=1
    )
    return GPT(config)


def tokens(rows):
    """Inputs, targets and unequal weights, so that a mean of means shows."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, VOCABULARY, (2, rows, LENGTH)).astype("int32")
    return x, y, rng.random((rows, LENGTH)) * (rng.random((rows, LENGTH)) > 0.3)


def fit(strategy):
    """Two epochs of batches of 4, 4 and 3 rows; returns weights and what Keras reports."""
    x, y, weights = tokens(11)
    with strategy.scope():
        model = build_model()
        model.compile(keras.optimizers.AdamW(0.01), TokenCrossEntropy())
    data = {"x": x, "y": y, "sample_weight": weights, "batch_size": ROWS, "verbose": 0}
    history = model.fit(**data, epochs=2, shuffle=False)
    loss = model.evaluate(**data)
    return model.get_weights(), [*history.history["loss"], loss], model


def step_by_step(strategy):
    """Three steps of the train-step library on global batches; returns weights and losses."""
    with strategy.scope():
        model = build_model()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    batch = tokens(ROWS)
    losses = [float(step(batch)) for _ in range(3)]
    return model.get_weights(), losses, model


# float64: sums in another order differ by 1e-16; Adam's root of tiny moments magnifies that.
TOLERANCE = 1e-9


def compare_training(train, mesh, **options):
    # Without a strategy a model lives on this process's first device.
    expected, expected_losses, _ = train(tf.distribute.get_strategy())
    strategy = MeshStrategy(mesh, **options)
    actual, losses, model = train(strategy)
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=TOLERANCE)
    return model


def check_fit_data_across():
    """Catches rows that both processes take, or optimizer state that is gathered from one only."""
    compare_training(fit, Mesh(data=2, tensor=2, devices=FIRST_ACROSS), zero_stage=1)


def check_fit_tensor_across():
    """Catches processes that take other rows though they differ on the tensor axis only."""
    compare_training(fit, Mesh(data=2, tensor=2, devices=LAST_ACROSS), sequence_parallel=True)


def check_train_step_fsdp_across():
    """Catches a weight that is read, or set, from the parts of one process only."""
    model = compare_training(step_by_step, Mesh(fsdp=4, devices=FIRST_ACROSS), zero_stage=3)
    before = model.get_weights()
    assert any(len(w._value.values[0].shape) == 1 < len(w.shape) for w in model.weights)
    model.set_weights([2 * value + 1 for value in before])
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(other, 2 * one + 1)


def coupled(strategy):
    """Trains a loss that is a ratio over the batch, with noise and an uneven batch."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(11, 4)), (rng.normal(size=(11, 2)) > 0).astype("float64")
    with strategy.scope():
        hidden = [keras.layers.Dense(6, "tanh"), keras.layers.Dropout(0.3)]
        hidden.append(keras.layers.BatchNormalization())
        model = keras.Sequential([keras.Input((4,)), *hidden, keras.layers.Dense(2, "sigmoid")])
        model.compile(keras.optimizers.SGD(0.5), keras.losses.Dice())
    loss = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    return [*model.get_weights(), loss, model.predict(x, batch_size=4, verbose=0)]


def check_coupled_rows_across():
    """Catches rows of another process that a loss, a mask or a statistic does not see."""
    expected = coupled(tf.distribute.get_strategy())
    for mesh in (Mesh(data=4, devices=FIRST_ACROSS), Mesh(fsdp=4, devices=FIRST_ACROSS)):
        for one, other in zip(coupled(MeshStrategy(mesh)), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


def check_values_outside_programs():
    """Catches a reduce, gather, dataset, seed or metric that knows of its own process only."""
    local = devices.visible_devices()[0]
    mesh = Mesh(data=2, fsdp=2, devices=FIRST_ACROSS)
    strategy = MeshStrategy(mesh)
    task = tf.DeviceSpec.from_string(local).task
    mine = (2 * task, 2 * task + 1)

    values = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(float(context.replica_id_in_sync_group + 1))
    )
    assert [float(v) for v in strategy.experimental_local_results(values)] == [i + 1 for i in mine]
    assert float(strategy.reduce("SUM", values, axis=None)) == 10
    assert float(strategy.reduce("MEAN", values, axis=None)) == 2.5
    assert float(strategy.reduce("SUM", 1.0, axis=None)) == 4

    # 5 rows over 4 replicas: the processes have unequal numbers of them.
    batches = tf.data.Dataset.range(13).batch(5)
    seen = []
    for batch in strategy.experimental_distribute_dataset(batches):
        assert len(strategy.experimental_local_results(batch)) == 2
        seen.append(strategy.gather(batch, axis=0).numpy().tolist())
        assert int(strategy.reduce("SUM", batch, axis=0)) == sum(seen[-1])
    assert seen == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]]

    def pipeline(context):
        assert (context.num_input_pipelines, context.input_pipeline_id) == (2, task)
        rows = tf.data.Dataset.range(7).shard(context.num_input_pipelines, task)
        return rows.batch(context.get_per_replica_batch_size(4))

    dealt = [
        strategy.gather(batch, axis=0).numpy().tolist()
        for batch in strategy.distribute_datasets_from_function(pipeline)
    ]
    assert dealt == [[0, 2, 1, 3], [4, 6, 5]]

    with strategy.scope():
        keras.utils.set_random_seed(0)
        generator = keras.random.SeedGenerator(7)
        metric = keras.metrics.Mean()
    assert generator.state.numpy().tolist() == keras.random.SeedGenerator(7).state.numpy().tolist()
    strategy.run(lambda x: metric.update_state(x), args=(values,))
    assert float(metric.result()) == 2.5
    metric.reset_state()
    assert float(metric.result()) == 0


def check_a_seed_across_processes():
    """Catches masks that differ for the same rows, or agree for others, in another process."""
    strategy = MeshStrategy(Mesh(data=2, tensor=2, devices=LAST_ACROSS))
    with strategy.scope():
        generator = keras.random.SeedGenerator(7)

    def program():
        drawn = keras.random.uniform((1, 3), seed=generator)
        return collectives.all_gather(drawn, ("data", "tensor"))

    results = strategy.experimental_local_results(strategy.run(program))
    first, same, other, last = results[0].numpy()
    np.testing.assert_array_equal(first, same)
    np.testing.assert_array_equal(other, last)
    assert not np.array_equal(first, other)
    one_device = keras.random.SeedGenerator(7)
    np.testing.assert_array_equal(first, keras.random.uniform((1, 3), seed=one_device)[0])
    np.testing.assert_array_equal(generator.state, one_device.state)


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


def main(task, ports, names):
    devices.configure_virtual_cpus(NUM_DEVICES)
    devices.connect_workers({"worker": [f"localhost:{port}" for port in ports]}, task)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    for name in names or CHECKS:
        started = time.monotonic()
        CHECKS[name]()
        print(f"passed {name}\n{time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    # Shows where a process waits for another that does not come, before it is killed.
    faulthandler.dump_traceback_later(900, exit=True)
    main(int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
