"""What is counted of a traced step: kinds and axes, loops, conditions, models, and what is refused.

Expected numbers are written out, of S = 4,000 bytes mostly: 1,000 elements of float32.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh, collectives
from llmos_tf.memory import rematerialised
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy

EIGHT = Mesh(data=4, tensor=2)
TWO = Mesh(data=2)
X = tf.TensorSpec([1000])


def counted(mesh, function, spec=X):
    """{(axis, kind): (calls, bytes)} of a function of a rank, which is traced and not run."""
    strategy = MeshStrategy(mesh)

    @tf.function
    def step(x):
        return strategy.run(function, (x,))

    return by_kind(collectives.traffic(strategy, step, batch=spec))


def by_kind(rows):
    assert all(list(row) == ["axis", "kind", "calls", "bytes"] for row in rows)
    found = {(row["axis"], row["kind"]): (row["calls"], row["bytes"]) for row in rows}
    assert len(found) == len(rows)
    return found


def test_kinds_and_axes():
    """Fails if a kind has the share of another, a reduce-scatter counts as what it is made of, an
    all-gather counts the part for the whole, or axes are left out or not joined."""

    def program(x):
        y = collectives.all_reduce(x, "data") + collectives.all_reduce(x, ["tensor", "data"])
        y += collectives.all_gather(x[:250], "data")
        y = collectives.reduce_scatter(y, "tensor")
        y = collectives.all_to_all(tf.concat([y, y], 0), "data")
        # Along an axis of size 1 nothing is sent.
        y = collectives.all_reduce(collectives.permute(y, "tensor"), "context")
        return collectives.broadcast(y, "data")

    assert counted(EIGHT, program) == {
        ("data", "all_reduce"): (2, 12_000),
        ("data+tensor", "all_reduce"): (1, 7_000),
        ("data", "all_gather"): (1, 3_000),
        ("tensor", "reduce_scatter"): (1, 2_000),
        ("data", "all_to_all"): (1, 3_000),
        ("tensor", "permute"): (1, 4_000),
    }


def test_bytes_are_those_of_what_travels():
    """Fails if elements are counted in place of bytes, or bytes of another type than is sent:
    bfloat16 travels as 16 bits, int8 from rank to rank in 32."""

    def program(x):
        half = collectives.all_gather(tf.cast(x, tf.bfloat16), "data")
        small = collectives.permute(tf.cast(x, tf.int8), "data")
        return tf.cast(half[:1000], tf.float32) + tf.cast(small, tf.float32)

    assert counted(TWO, program) == {
        ("data", "all_gather"): (1, 2_000),
        ("data", "permute"): (1, 4_000),
    }


def test_scalars_are_summed():
    """Fails if losses and counts have rows of their own, or if small parts of weights have not."""

    def program(x):
        loss = collectives.all_reduce(tf.reduce_sum(x), "data")
        counts = collectives.all_gather(tf.ones([8], tf.int32), "data")
        norms = collectives.all_reduce(x[:255], "data")
        part = collectives.all_gather(x[:100], "data")
        edge = collectives.all_reduce(x[:256], "data")
        return loss, counts, norms, part, edge

    assert counted(TWO, program) == {
        ("data", "scalars"): (3, 4 + 32 + 1020),
        ("data", "all_gather"): (1, 400),
        ("data", "all_reduce"): (1, 1024),
    }


def test_loops_and_conditions():
    """Fails if a loop's body, or a loop in it, counts once or for ever, the loop of a gradient does
    not count, branches are added up, or the smaller one is taken."""

    def program(x):
        for _ in tf.range(3):
            for _ in tf.range(1, 9, 4):
                x = collectives.all_reduce(x, "data")
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.while_loop(
                lambda i, y: i < 5,
                lambda i, y: (i + 1, collectives.permute(y * y, "tensor")),
                (0, x),
            )[1]
        x += tape.gradient(y, x)
        return tf.cond(
            x[0] > 0,
            lambda: collectives.all_to_all(x, "data"),
            lambda: collectives.all_gather(x, "data")[:1000],
        )

    assert counted(EIGHT, program) == {
        ("data", "all_reduce"): (6, 36_000),
        ("tensor", "permute"): (10, 40_000),
        ("data", "all_gather"): (1, 12_000),
    }


def test_what_is_computed_again_and_what_is_not_used():
    """Fails if a block that the backward pass runs again counts once, or if a tensor counts that
    nobody takes."""

    def program(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            collectives.permute(x, "data")
            y = rematerialised(lambda x: collectives.all_reduce(x * x, "data") ** 2)(x)
        return tape.gradient(y, x)

    # Forward, forward again, and the gradient.
    assert counted(TWO, program) == {("data", "all_reduce"): (3, 12_000)}


def test_loops_around_run_are_steps():
    """Fails if several steps in one call count as one."""
    strategy = MeshStrategy(TWO)

    @tf.function
    def steps(x):
        for _ in tf.range(10):
            x = strategy.run(lambda x: collectives.all_reduce(x, "data"), (x,)).values[0]
        return x

    rows = collectives.traffic(strategy, steps, batch=X)
    assert rows == [{"axis": "data", "kind": "all_reduce", "calls": 1, "bytes": 4000}]
    assert str(rows).splitlines()[-1] == "| data | all_reduce | 1 | 4,000 |"


def test_the_stage_that_sends_most_is_shown():
    """Fails if the rows of several stages are added up, or the wrong one is taken."""
    strategy = MeshStrategy(Mesh(pipe=2))

    def program(x):
        # Each stage has a program of its own; these two would never meet.
        times = 3 if current_program().stage == 1 else 2
        return [collectives.permute(x, "pipe") for _ in range(times)]

    @tf.function
    def step(x):
        return strategy.run(program, (x,))

    def sent(**options):
        return by_kind(collectives.traffic(strategy, step, batch=X, **options))

    assert sent() == sent(stage=1) == {("pipe", "permute"): (3, 12_000)}
    assert sent(stage=0) == {("pipe", "permute"): (2, 8_000)}


def test_a_division_that_does_not_go_up_is_rounded_once():
    """Fails if each collective is rounded by itself: the sum of many would drift."""

    def program(x):
        return [collectives.all_reduce(x[:257], "data") for _ in range(3)]

    assert counted(Mesh(data=3), program) == {("data", "all_reduce"): (3, 4112)}


@pytest.fixture(scope="module")
def fitted():
    """A model with an activation that travels, fitted on batches of any number of rows."""
    strategy = MeshStrategy(
        Mesh(data=2, tensor=2), layout_map={".*/dense/kernel": (None, "tensor")}
    )
    with strategy.scope():
        layers = [keras.Input([64]), keras.layers.Dense(128, use_bias=False, name="dense")]
        model = keras.Sequential(layers)
        model.compile("sgd", "mse", steps_per_execution=2)
    x, y = np.zeros([28, 64], "float32"), np.zeros([28, 128], "float32")
    model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(8), verbose=0)
    return strategy, model, (x, y)


def test_a_model(fitted):
    """Fails if a step of `fit` counts with its loop, the rows of a whole batch are not found, or
    those of `batch` do not count."""
    strategy, model, (x, y) = fitted
    # 4 rows of 128 outputs: gathered forward. The kernel's slice [64, 64] is summed over data.
    rows = by_kind(collectives.traffic(strategy, model))
    assert rows["tensor", "all_gather"] == (1, 4 * 128 * 4 // 2)
    assert rows["data", "all_reduce"] == (1, 64 * 64 * 4)
    assert rows["data", "scalars"][1] < 100
    wide = by_kind(collectives.traffic(strategy, model, batch=(x[:16], y[:16])))
    assert wide["tensor", "all_gather"] == (1, 8 * 128 * 4 // 2)
    with pytest.raises(ValueError, match="Call evaluate of the model"):
        collectives.traffic(strategy, model, evaluate=True)
    model.evaluate(x[:16], y[:16], batch_size=8, verbose=0)
    evaluated = by_kind(collectives.traffic(strategy, model, evaluate=True))
    assert evaluated["tensor", "all_gather"] == rows["tensor", "all_gather"]
    assert ("data", "all_reduce") not in evaluated


def test_small_gradients_are_no_scalars():
    """Fails if the gradient of a small weight is taken for a loss."""
    strategy = DataParallelStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential([keras.Input([5]), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    batch = (tf.TensorSpec([8, 5]), tf.TensorSpec([8, 1]))
    rows = by_kind(collectives.traffic(strategy, model, batch=batch))
    assert rows["data", "all_reduce"] == (1, 24)


def test_what_cannot_be_counted(fitted):
    """Fails if a step that is not there counts as one that sends nothing, or the user is not told
    what would work."""
    mine, model, _ = fitted
    other = MeshStrategy(Mesh(data=2, tensor=2))

    def refused(match, strategy, step, **options):
        with pytest.raises(ValueError, match=match):
            collectives.traffic(strategy, step, **options)

    @tf.function
    def step(x):
        return other.run(lambda x: collectives.all_reduce(x, "data"), (x,))

    refused("not traced yet.*Call it once first", other, step)
    step(tf.zeros([1000]))
    assert len(collectives.traffic(other, step)) == 1
    refused("runs nothing on the mesh", mine, step)
    refused("runs nothing on the mesh", other, tf.function(lambda x: x), batch=X)
    refused("scope of another strategy", other, model)
    refused("tf.function that calls strategy.run.*Received: 3", other, 3)
    refused("has the stages 0 to 0. Received: stage=1", other, step, stage=1)
    refused("of a mesh strategy", tf.distribute.get_strategy(), step)
    any_length = tf.TensorSpec([None])
    refused("all_reduce along data.*shape .None.*Give a batch", other, step, batch=any_length)

    @tf.function
    def endless(x):
        def program(x):
            for _ in tf.range(tf.cast(x[0], tf.int32)):
                x = collectives.all_reduce(x, "data")
            return x

        return other.run(program, (x,))

    refused("The loop .* depends on more than constants", other, endless, batch=X)
