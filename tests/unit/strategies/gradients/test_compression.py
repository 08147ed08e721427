"""Compressed sums of gradients: what is rounded, what is kept for later, and what is sent."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf import Mesh, collectives, devices, memory
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.gradients.compression import BLOCK, CODECS
from llmos_tf.strategies.gradients.powersgd import is_compressible, matrix_shape
from llmos_tf.training import GradientDescent

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def round_trip(name, rows):
    codec = CODECS[name]
    bits = codec.encode(tf.constant(rows, tf.float32))
    assert bits.dtype == tf.float32
    return codec.decode(bits).numpy()


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=20), st.floats(1e-6, 1e6))
def test_rounding_is_bounded(values, other):
    """Fails if a scale is taken from another block or row, or a level is lost."""
    rows = np.zeros((2, 2 * BLOCK), np.float32)
    rows[0, : len(values)] = values
    rows[1, BLOCK:] = other
    largest = np.abs(rows).max(1, keepdims=True)
    error = {name: np.abs(round_trip(name, rows) - rows) for name in CODECS}
    assert (error["bf16"] <= 2.0**-8 * np.abs(rows)).all()
    # Eleven bits, or of what is very small a piece of the largest.
    assert (error["fp16"] <= np.maximum(2.0**-11 * np.abs(rows), 2.0**-38 * largest) + 1e-37).all()
    blocks = np.abs(rows.reshape(2, -1, BLOCK)).max(2).repeat(BLOCK, 1)
    assert (error["int8"] <= blocks / 254 * 1.001 + 1e-30).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_not_finite_stays_so(name, value):
    """Fails if an overflow turns into a number, so that a loss scale would take the step."""
    rows = np.ones((1, BLOCK), np.float32)
    rows[0, 3] = value
    assert not np.isfinite(round_trip(name, rows)).all()


def test_float16_does_not_overflow():
    """Fails if float16 gets gradients as they are: it ends at 65,504."""
    rows = np.float32([[1e6, -3e7, 1.0, 2e5]])
    np.testing.assert_allclose(round_trip("fp16", rows), rows, rtol=2.0**-11)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((64, 4, 16), (64, 64)), ((4, 16, 64), (64, 64)), ((5,), (1, 5))]
)
def test_matrix_shape(shape, matrix):
    """Fails if a kernel of heads is cut where it costs more to send."""
    assert matrix_shape(shape) == matrix
    assert is_compressible(shape, 4) == (len(shape) == 3)


def sums_of(strategy, gradients):
    """What plain gradient descent at rate 1 applies in turn, where rank r's gradient of step t is
    gradients[t, r]; and the weight."""
    with strategy.scope():
        weight = keras.layers.Layer().add_weight(
            shape=gradients.shape[2:], initializer="zeros", name="w"
        )
        optimizer = GradientDescent(1.0)

    @tf.function(autograph=False)
    def step(all_ranks):
        def program():
            mine = tf.gather(all_ranks, collectives.axis_index("data"))
            optimizer.apply([mine], [weight])

        strategy.run(program)

    applied, before = [], np.zeros(gradients.shape[2:])
    for of_step in gradients:
        step(tf.constant(of_step, tf.float32))
        now = -np.array(weight)
        applied.append(now - before)
        before = now
    return np.array(applied), weight


def four(**options):
    return MeshStrategy(Mesh(data=4, devices=devices.visible_devices()[:4]), **options)


def test_error_feedback_loses_nothing():
    """Fails if a rank forgets what it has rounded, in its own gradient or in the sum of its part:
    the error of all steps together would grow, and not stay that of one."""
    gradients = np.random.default_rng(0).normal(size=(12, 4, 16, 40))
    # Below a level of int8, so that it is always rounded to 0 without what is kept.
    gradients[:, :, :, 1:] *= 1e-3
    gradients[:, :, :, 1:] += 2e-3
    applied, weight = sums_of(four(gradient_compression="int8"), gradients)
    exact = gradients.sum(1)
    assert np.abs(applied[0] - exact[0]).max() > 1e-4
    (kept,) = weight.value.reduction_state.values()
    # A row for each rank's part, of whole blocks.
    left = sum(component.numpy() for component in kept.values)[:, : exact[0].size // 4]
    np.testing.assert_allclose(
        applied.sum(0) + left.reshape(exact[0].shape), exact.sum(0), rtol=0, atol=2e-5
    )


def test_powersgd_of_low_rank_is_exact():
    """Fails if a side is not summed over the ranks, or not made orthonormal; and, as rank 2 is not
    enough for four ranks' own matrices, if what is left out is not kept."""
    rng = np.random.default_rng(0)
    right = rng.normal(size=(2, 32))
    low = np.stack([rng.normal(size=(24, 2)) @ right for _ in range(4)])
    strategy = four(gradient_compression="powersgd", powersgd_rank=2)
    applied, _ = sums_of(strategy, np.stack([low] * 3))
    for one in applied:
        np.testing.assert_allclose(one, low.sum(0), rtol=0, atol=1e-4)
    full = rng.normal(size=(1, 4, 24, 32)).repeat(6, 0)
    applied, weight = sums_of(strategy, full)
    left = next(v for k, v in weight.value.reduction_state.items() if "error" in k[0])
    left = sum(component.numpy() for component in left.values).reshape(24, 32)
    np.testing.assert_allclose(applied.sum(0) + left, full.sum((0, 1)), rtol=0, atol=1e-3)


LOSSES = {
    # Mesh, options, share of the bytes, and of the first loss by which the last may be above.
    "bf16": ({"data": 2, "tensor": 2}, {}, 0.5, 0.01),
    "fp16": ({"data": 4}, {"zero_stage": 1}, 0.5, 0.01),
    "int8": ({"data": 2, "fsdp": 2}, {}, 0.3, 0.02),
    # The kernels are far from rank 2.
    "powersgd": ({"data": 4}, {"powersgd_rank": 2}, 0.4, 0.15),
}


def trained(axes, options, table):
    mesh = Mesh(**axes, devices=devices.visible_devices()[:4])
    strategy = MeshStrategy(mesh, layout_map=table, **options)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((24,)),
                keras.layers.Dense(64, "relu", name="hidden"),
                keras.layers.Dense(40),
            ]
        )
        model.compile(keras.optimizers.Adam(0.01), "mse")
    x = np.random.default_rng(0).normal(size=(64, 24)).astype("float32")
    y = np.tile(x, 2)[:, :40] ** 2
    losses = model.fit(x, y, batch_size=16, epochs=8, shuffle=False, verbose=0).history["loss"]
    sent = [row for row in collectives.traffic(strategy, model) if row["axis"] == "data"]
    return np.array(losses), {row["kind"]: row["bytes"] for row in sent}, model


@pytest.mark.parametrize("name", LOSSES)
def test_trains_and_sends_less(name):
    """Fails if a method does not learn on a mesh that it is for, or sends as much as without it."""
    axes, options, share, gap = LOSSES[name]
    table = {".*/hidden/kernel": (None, "tensor")} if "tensor" in axes else None
    plain = {key: value for key, value in options.items() if key == "zero_stage"}
    losses, sent, _ = trained(axes, plain, table)
    fewer, compressed, model = trained(axes, {**options, "gradient_compression": name}, table)
    kind = "reduce_scatter" if plain else "all_reduce"
    assert sent.keys() == compressed.keys()
    assert compressed[kind] <= share * sent[kind] * 1.1
    assert losses[-1] < 0.8 * losses[0]
    assert fewer[-1] < losses[-1] + gap * losses[0]
    rows = memory.report(model)
    parameters, optimizer = rows[0]["parameters"], rows[0]["optimizer"]
    assert (optimizer > 2.3 * parameters) == (name in ("int8", "powersgd"))
