"""The mixture layer: on one device by its formula, in Keras models, and by itself on a mesh.

How language models use it on every mesh is in tests/integration/test_experts.py.
"""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh
from llmos_tf.layers import MoE
from llmos_tf.strategies import MeshStrategy
from llmos_tf.testing import max_difference, train

WIDTH, INNER, EXPERTS, LENGTH = 6, 8, 4, 5
ROWS, STEPS = 8, 4
# Sums of a few hundred float64 products.
EXACT = {"rtol": 0, "atol": 1e-12}
EXPERT_LAYOUTS = {
    ".*moe/experts/up": ("expert", None, None, "tensor"),
    ".*moe/experts/down": ("expert", "tensor", None),
}


def wide():
    """Larger than by default, so that the router decides."""
    return keras.initializers.RandomNormal(stddev=0.6)


def make(**options):
    keras.utils.set_random_seed(0)
    layer = MoE(WIDTH, INNER, EXPERTS, initializer=wide(), **options)
    layer.build()
    return layer


def random(*shape):
    return np.random.default_rng(0).normal(size=shape)


def one_token(layer, x):
    """Mixtral's formula for one token."""
    logits = x @ layer.router.kernel.numpy()
    best = np.argsort(-logits)[: layer.router.num_experts_per_token]
    weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
    y = np.zeros_like(x)
    for weight, expert in zip(weights, best, strict=True):
        gate, up = np.einsum("d,dcf->cf", x, layer.experts.up.numpy()[expert])
        y += weight * (gate / (1 + np.exp(-gate)) * up) @ layer.experts.down.numpy()[expert]
    return y


@pytest.mark.parametrize("per_token", [1, 2, EXPERTS])
def test_formula(float64, per_token):
    """Fails if a token meets another expert, a weight that is not its expert's, or gate and up are
    the wrong way round."""
    layer = make(num_experts_per_token=per_token)
    x = random(2, LENGTH, WIDTH)
    expected = np.array([[one_token(layer, token) for token in row] for row in x])
    np.testing.assert_allclose(layer(x), expected, **EXACT)


def test_a_token_without_room_gets_nothing(float64):
    """Fails if a choice without room is computed in training, if weights are scaled up for what
    was dropped, if anything is dropped outside of training, or `dropped` counts something else."""
    layer = make(num_experts_per_token=1, capacity_factor=0.5)
    x = random(1, 8, WIDTH)
    free = layer(x).numpy()
    assert free.any(-1).all()
    np.testing.assert_array_equal(layer.dropped, 0)
    limited = layer(x, training=True).numpy()
    # An expert has room for one of eight tokens: as many as experts were chosen at all.
    is_dropped = ~limited.any(-1)
    chosen = np.argmax(x @ layer.router.kernel.numpy(), -1)[0]
    first = [t for t, expert in enumerate(chosen) if expert not in chosen[:t]]
    np.testing.assert_array_equal(np.flatnonzero(~is_dropped[0]), first)
    np.testing.assert_allclose(limited[~is_dropped], free[~is_dropped], **EXACT)
    np.testing.assert_allclose(layer.dropped, is_dropped.mean(), **EXACT)


def test_losses_and_load_are_of_training(float64):
    """Fails if a held-out loss has the routing's losses in it, or the load is not the share of all
    choices: it sums to 1."""
    layer = make(load_balance_weight=0.5, router_z_weight=0.25)
    x = random(2, LENGTH, WIDTH)
    layer(x)
    assert layer.losses == []
    np.testing.assert_array_equal(layer.load, np.zeros(EXPERTS))
    layer(x, training=True)
    logits = x @ layer.router.kernel.numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = np.argsort(-logits, -1)[..., :2]
    share = np.bincount(best.ravel(), minlength=EXPERTS) / best.size
    balance = EXPERTS * (share * probabilities.mean((0, 1))).sum()
    z = (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    np.testing.assert_allclose(layer.losses, [0.5 * balance + 0.25 * z], **EXACT)
    np.testing.assert_allclose(layer.load, share, **EXACT)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """Fails if the result is not of the compute dtype, routing in 16 bits sends a token to other
    experts, or the load is rounded. Kernels and products have 8 bits at least: 3% of the most."""
    x = random(2, LENGTH, WIDTH).astype("float32")
    expected = make()(x)
    keras.config.set_dtype_policy(policy)
    layer = make()
    y = layer(x, training=True)
    assert y.dtype == layer.compute_dtype
    limit = 0.03 * np.abs(expected).max()
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, rtol=0, atol=limit)
    assert layer.losses[0].dtype == "float32"
    choices = layer.load.numpy() * 2 * 2 * LENGTH
    np.testing.assert_allclose(choices, np.round(choices), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts_per_token": 5}, "num_experts_per_token=5, num_experts=4"),
        ({"num_experts_per_token": 0}, "num_experts_per_token=0, num_experts=4"),
        ({"capacity_factor": 0}, "capacity_factor is a positive number or None. Received: 0"),
        ({"initializer": "glorot_uniform"}, "must not scale by the shape.*Received: .*Glorot"),
    ],
)
def test_what_is_refused(options, message):
    """Fails if a mistake shows as a shape error of TensorFlow's, or not at all."""
    with pytest.raises(ValueError, match=message):
        MoE(WIDTH, INNER, EXPERTS, **options)


def test_tokens_without_positions_are_refused():
    """Fails if rows of a plain batch are taken for positions of one sequence."""
    with pytest.raises(ValueError, match=r"Received: a tensor of shape \(3, 6\)"):
        make()(random(3, WIDTH))


# --- in a Keras model that knows nothing of meshes ------------------------------------------------


def build_model():
    """A functional model; the mixture gives the residual its second term."""
    inputs = keras.Input([LENGTH, WIDTH])
    layer = MoE(
        WIDTH,
        INNER,
        EXPERTS,
        initializer=wide(),
        load_balance_weight=0.5,
        router_z_weight=0.5,
        name="moe",
    )
    x = keras.layers.Dense(WIDTH)(inputs)
    outputs = keras.layers.Dense(1)(x + layer(x))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.AdamW(0.01), "mse")
    return model


def batches():
    rng = np.random.default_rng(1)
    return [
        (rng.normal(size=(ROWS, LENGTH, WIDTH)), rng.normal(size=(ROWS, LENGTH, 1)))
        for _ in range(STEPS)
    ]


@pytest.mark.parametrize(
    ("mesh", "layouts"),
    [
        (Mesh(data=2), None),
        (Mesh(expert=2), EXPERT_LAYOUTS),
        (Mesh(data=2, expert=2, tensor=2), EXPERT_LAYOUTS),
    ],
    ids=str,
)
def test_a_keras_model_with_a_mixture_has_the_weights_of_one_device(float64, mesh, layouts):
    """Fails if, with the same tokens on all ranks of the expert axis, a result is counted by each,
    a gradient of x or of the routing's weights is only that of the own experts, or the losses
    count a rank's tokens twice."""
    reference = train(build_model, batches())
    result = train(build_model, batches(), MeshStrategy(mesh, layout_map=layouts))
    assert max_difference(reference, result) <= 1e-12
    np.testing.assert_allclose(result.losses, reference.losses, **EXACT)


@pytest.mark.parametrize(
    ("mesh", "layouts", "message"),
    [
        (Mesh(expert=2), None, "has the axis expert, and no model uses it"),
        (Mesh(expert=3), EXPERT_LAYOUTS, "axis expert of size 3 does not divide its dimension 0"),
    ],
)
def test_axes_that_cannot_be_used_are_refused(mesh, layouts, message):
    """Fails if a mesh's expert axis does nothing without a word, or dies while a step is traced."""
    strategy = MeshStrategy(mesh, layout_map=layouts)
    with pytest.raises(ValueError, match=message):
        train(build_model, batches(), strategy)
    assert strategy.num_traces == 0


@pytest.mark.parametrize("how", ["jit", "remat"])
def test_blocks(float64, how):
    """Fails if XLA is given a mixture, whose shapes are dynamic (in prediction nothing else keeps
    it out), or if what runs again in the backward pass notes its load or adds its losses twice."""

    def build():
        scope = keras.RematScope("full") if how == "remat" else contextlib.nullcontext()
        with scope:
            model = build_model()
        model.compile(keras.optimizers.AdamW(0.01), "mse", jit_compile=how == "jit")
        return model

    reference = train(build_model, batches())
    result = train(build, batches(), MeshStrategy(Mesh(data=2)))
    assert max_difference(reference, result) <= 1e-12
    np.testing.assert_allclose(result.losses, reference.losses, **EXACT)
    x = batches()[0][0]
    expected = reference.model.predict(x, verbose=0)
    np.testing.assert_allclose(result.model.predict(x, verbose=0), expected, **EXACT)
