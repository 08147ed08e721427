"""Plain gradient descent: θ ← θ - η∇J(θ), and nothing else."""

import keras
import numpy as np
import pytest

from llmos_tf import Mesh
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training import GradientDescent, make_loss_step, make_train_step

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 1))
MESHES = {"one": None, "data4": Mesh(data=4), "fsdp2": Mesh(fsdp=2), "both": Mesh(data=2, fsdp=2)}


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_by_hand(float64, mesh):
    """Fails for a missing all-reduce, a mean over ranks, a wrong sign or a forgotten factor."""
    layers = [keras.Input([3]), keras.layers.Dense(1)]
    if MESHES[mesh] is None:
        model, optimizer = keras.Sequential(layers), GradientDescent(0.25)
    else:
        with MeshStrategy(MESHES[mesh]).scope():
            model, optimizer = keras.Sequential(layers), GradientDescent(0.25)
    w, b = model.get_weights()
    step = make_train_step(model, optimizer, "mean_squared_error")
    for _ in range(3):
        error = X @ w + b - Y
        loss = step(X, Y)
        assert float(loss) == pytest.approx((error**2).mean(), abs=1e-12)
        w, b = w - 0.25 * 2 * X.T @ error / 8, b - 0.25 * 2 * error.mean(0)
        np.testing.assert_allclose(model.get_weights()[0], w, rtol=0, atol=1e-12)
        np.testing.assert_allclose(model.get_weights()[1], b, rtol=0, atol=1e-12)
    assert int(optimizer.iterations) == 3


def test_forms_of_a_batch_and_losses(float64):
    """Fails if one way to give a batch, its weights or the loss trains something else."""
    weights = RNG.random(8)

    def trained(loss, *batches, distribute=False):
        keras.utils.set_random_seed(0)
        strategy = MeshStrategy(Mesh(data=2))
        with strategy.scope():
            model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
            optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        step = make_train_step(model, optimizer, loss)
        for batch in batches:
            step(*batch)
        return model.get_weights()

    loss = keras.losses.MeanSquaredError()
    reference = trained(loss, (X, Y, weights), (X, Y))
    for same in (
        trained("mse", ((X, Y, weights),), ((X, Y),)),
        trained(lambda y, p: keras.ops.mean((y - p) ** 2, -1), (X, Y, weights), (X, Y)),
    ):
        for one, other in zip(reference, same, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    assert np.abs(trained(loss, (X, Y), (X, Y))[0] - reference[0]).max() > 1e-3


def test_a_language_model_on_a_tensor_mesh(float64):
    """Fails if the custom loop and fit differ, or sharded logits are averaged twice; and if the
    loss step changes a weight."""
    tokens = RNG.integers(0, 30, (4, 8))

    def model_on(strategy):
        keras.utils.set_random_seed(0)
        config = GPTConfig(vocab_size=30, max_positions=8, hidden_size=8, num_heads=2, num_layers=1)
        with strategy.scope():
            model = GPT(config)
            model.compile(keras.optimizers.Adam(0.01), TokenCrossEntropy())
        return model

    strategy = MeshStrategy(Mesh(data=2, tensor=2))
    model = model_on(strategy)
    step = make_train_step(model, model.optimizer, TokenCrossEntropy())
    losses = [float(step(tokens, tokens)) for _ in range(2)]
    before = model.get_weights()
    evaluated = float(make_loss_step(model, TokenCrossEntropy())(tokens, tokens))
    assert evaluated < losses[1] < losses[0]
    fitted = model_on(strategy)
    fitted.fit(tokens, tokens, batch_size=4, epochs=2, shuffle=False, verbose=0)
    after = model.get_weights()
    for one, other, kept in zip(fitted.get_weights(), before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
        np.testing.assert_array_equal(other, kept)


def test_misuse():
    """Fails if a model without weights, or a batch of one or four values, ends in a traceback of
    TensorFlow's."""
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="has no weights yet"):
        make_train_step(model, GradientDescent(), "mse")
    model.build((None, 3))
    step = make_train_step(model, GradientDescent(), "mse")
    with pytest.raises(ValueError, match=r"takes \(x, y\) or \(x, y, sample_weight\)"):
        step(X)
    with pytest.raises(ValueError, match=r"takes \(x, y\) or \(x, y, sample_weight\)"):
        step(X, Y, Y, Y)
