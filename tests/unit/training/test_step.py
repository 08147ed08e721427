"""The train step: its update is the formula's, on every mesh that of one device."""

import functools
import gc

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import in_turn

from llmos_tf import Mesh
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy
from llmos_tf.training import GradientDescent, make_loss_step, make_train_step
from llmos_tf.training.step import as_batch, as_loss

pytestmark = pytest.mark.graph_optimizer

# Float64; sums in another order differ by 1e-16 relative.
EXACT = 1e-12
# Adam's division by the root of a tiny second moment magnifies that, to some 1e-14.
TOLERANCE = 1e-9

RATE = 0.1
_rng = np.random.default_rng(0)
X, Y = _rng.normal(size=(9, 4)), _rng.normal(size=(9, 2))
WEIGHTS = _rng.random(9)
KERNEL, BIAS = _rng.normal(size=(4, 2)), _rng.normal(size=2)

MESHES = {
    "one device": lambda: tf.distribute.get_strategy(),
    "data2": lambda: MeshStrategy(Mesh(data=2)),
    "data4": lambda: MeshStrategy(Mesh(data=4)),
    "fsdp2": lambda: MeshStrategy(Mesh(fsdp=2)),
    "tensor2": lambda: MeshStrategy(Mesh(tensor=2)),
}


def linear_model(strategy, **options):
    """y = x W + b, whose gradient fits on a line."""
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, **options)])
    model.set_weights([KERNEL, BIAS])
    return model


def descend(x, y, kernel, bias, rate, weights=None):
    """Loss of y = x W + b, and weights after θ ← θ - η∇J(θ), worked out by hand."""
    weights = np.ones(len(x)) if weights is None else weights
    error = x @ kernel + bias - y
    loss = ((error**2).mean(1) * weights).mean()
    slope = 2 * error * weights[:, np.newaxis] / error.size
    return loss, kernel - rate * x.T @ slope, bias - rate * slope.sum(0)


@pytest.mark.parametrize("name", ["one device", "data2", "data4", "fsdp2"])
def test_plain_gradient_descent(float64, name):
    """Fails if the gradient is a mean of means, is summed twice, or the loss is that of the new
    weights. Rows: 9, which no mesh divides, then 1, which leaves ranks without."""
    strategy = MESHES[name]()
    model = linear_model(strategy)
    with strategy.scope():
        step = make_train_step(model, GradientDescent(RATE), "mse")
    kernel, bias = KERNEL, BIAS
    for x, y in [(X, Y), (X[::-1], Y), (X[:1], Y[:1])]:
        expected, kernel, bias = descend(x, y, kernel, bias, RATE)
        np.testing.assert_allclose(step(x, y), expected, atol=EXACT)
        np.testing.assert_allclose(model.get_weights()[0], kernel, atol=EXACT)
        np.testing.assert_allclose(model.get_weights()[1], bias, atol=EXACT)


def test_learning_rate_schedule(float64):
    """Fails if the schedule is read before the step or counts steps of each rank."""
    strategy = MESHES["data2"]()
    model = linear_model(strategy)
    with strategy.scope():
        rate = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.1, 0.01, 0.5])
        step = make_train_step(model, GradientDescent(rate), keras.losses.MeanSquaredError())
    kernel, bias = KERNEL, BIAS
    for eta in (0.1, 0.01, 0.5):
        _, kernel, bias = descend(X, Y, kernel, bias, eta)
        step(X, Y)
    np.testing.assert_allclose(model.get_weights()[0], kernel, atol=EXACT)
    np.testing.assert_allclose(model.get_weights()[1], bias, atol=EXACT)


def test_forms_of_a_batch(float64):
    """Fails if a form of input is split twice or not at all, or sample weights are lost."""
    strategy = MESHES["data2"]()
    step = make_loss_step(linear_model(strategy), "mse")
    plain = descend(X, Y, KERNEL, BIAS, 0)[0]
    weighted = descend(X, Y, KERNEL, BIAS, 0, WEIGHTS)[0]
    for batch in [(X, Y), ((X, Y),), ([tf.constant(X), tf.constant(Y)],)]:
        np.testing.assert_allclose(step(*batch), plain, atol=EXACT)
    for batch in [(X, Y, WEIGHTS), ((X, Y, WEIGHTS),)]:
        np.testing.assert_allclose(step(*batch), weighted, atol=EXACT)
    data = tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(9)
    for batch in strategy.experimental_distribute_dataset(data):
        np.testing.assert_allclose(step(batch), weighted, atol=EXACT)


@pytest.mark.parametrize(
    "batch", [(X,), ((X,),), (X, Y, WEIGHTS, WEIGHTS), ((X, Y, WEIGHTS, Y),), ({"x": X},)]
)
def test_another_number_of_values_is_refused(batch):
    """Fails if the labels of a batch are guessed."""
    with pytest.raises(ValueError, match=r"\(x, y\) or \(x, y, sample_weight\).*Received"):
        as_batch(*batch)


def test_losses_by_name_function_and_object(float64):
    """Fails if a function's mean over the rows of a rank is averaged over ranks: 9 rows on two."""
    strategy = MESHES["data2"]()
    model = linear_model(strategy)
    expected = descend(X, Y, KERNEL, BIAS, 0)[0]
    for loss in (
        "mean_squared_error",
        keras.losses.MeanSquaredError(),
        keras.losses.mean_squared_error,
        lambda y, p: tf.reduce_mean(tf.square(y - p), axis=-1),
        lambda y, p: tf.reduce_mean(tf.square(y - p)),
    ):
        np.testing.assert_allclose(make_loss_step(model, loss)(X, Y), expected, atol=EXACT)
    assert isinstance(as_loss("mse"), keras.losses.Loss)


def test_regularizers_count_once(float64):
    """Fails if each rank adds a regularizer's gradient, or it is left out of the loss."""
    strategy = MESHES["data4"]()
    model = linear_model(strategy, kernel_regularizer=keras.regularizers.L2(0.3))
    with strategy.scope():
        step = make_train_step(model, GradientDescent(RATE), "mse")
    loss, kernel, bias = descend(X, Y, KERNEL, BIAS, RATE)
    np.testing.assert_allclose(step(X, Y), loss + 0.3 * (KERNEL**2).sum(), atol=EXACT)
    np.testing.assert_allclose(model.get_weights()[0], kernel - RATE * 0.6 * KERNEL, atol=EXACT)
    np.testing.assert_allclose(model.get_weights()[1], bias, atol=EXACT)


def test_loss_step_changes_nothing(float64):
    """Fails if the step drops, updates statistics, or counts a step."""
    strategy = MESHES["data2"]()
    with strategy.scope():
        layers = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)]
        model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    before = [w.numpy() for w in model.variables]
    step = make_loss_step(model, "mse")
    assert float(step(X, Y)) == float(step(X, Y))
    for one, other in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


def test_what_cannot_be_trained_is_refused():
    """Fails if an error comes from deep inside of TensorFlow, or training goes wrong silently."""
    strategy = DataParallelStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        unbuilt = keras.Sequential([keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"has no weights yet.*Build it first"):
        make_train_step(unbuilt, GradientDescent(), "mse")
    step = make_train_step(linear_model(strategy), GradientDescent(), "mse")
    with pytest.raises(ValueError, match=r"optimizer 'gradient_descent' was made outside.*scope"):
        step(X.astype("float32"), Y.astype("float32"))


# --- a language model, every optimizer option on every kind of mesh ------------------------------

CONFIG = GPTConfig(vocab_size=20, max_positions=6, hidden_size=8, num_heads=2, num_layers=1)

# Thresholds so low that they clip at every step.
OPTIMIZERS = {
    "plain": lambda: GradientDescent(0.5),
    "global_clipnorm, weight_decay": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1, global_clipnorm=0.01
    ),
    "clipnorm, use_ema": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, clipnorm=0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "clipvalue, gradient_accumulation_steps": lambda: keras.optimizers.Adam(
        0.01, clipvalue=1e-3, gradient_accumulation_steps=2
    ),
}


@functools.cache
def token_batches():
    """Three batches in which rows weigh unequally."""
    rng = np.random.default_rng(1)
    shape = (3, 4, CONFIG.max_positions)
    x, y = rng.integers(0, CONFIG.vocab_size, (2, *shape)).astype("int32")
    weights = rng.random(shape) * (rng.random(shape) > 0.3)
    weights[:, :2] *= 0.2
    return list(zip(x, y, weights, strict=True))


def language_model(strategy, optimizer):
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    with strategy.scope():
        return GPT(CONFIG), OPTIMIZERS[optimizer]()


def train(name, optimizer):
    """Losses and weights of three steps."""
    model, optimizer = language_model(MESHES[name](), optimizer)
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    losses = [float(step(batch)) for batch in token_batches()]
    return losses, model.get_weights()


@functools.cache
def one_device(optimizer):
    return train("one device", optimizer)


@pytest.mark.parametrize(
    ("optimizer", "name"), in_turn(OPTIMIZERS, ["data2", "fsdp2", "tensor2"], 3)
)
def test_every_mesh_has_the_weights_of_one_device(float64, optimizer, name):
    """Fails if a norm counts a slice once for each rank that has it or leaves out the others',
    if gradients are clipped before they are summed, or averages and accumulators are of parts."""
    losses, weights = train(name, optimizer)
    expected_losses, expected = one_device(optimizer)
    np.testing.assert_allclose(losses, expected_losses, atol=TOLERANCE)
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_fit_has_the_same_weights(float64):
    """Fails if Keras's own step divides, reduces or updates otherwise than this one."""
    losses, weights = one_device("global_clipnorm, weight_decay")
    strategy = MeshStrategy(Mesh(data=2, tensor=2))
    model, optimizer = language_model(strategy, "global_clipnorm, weight_decay")
    model.compile(optimizer, TokenCrossEntropy())
    reported = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: reported.append(float(logs["loss"]))
    )
    x, y, w = (np.concatenate(column) for column in zip(*token_batches(), strict=True))
    model.fit(x, y, sample_weight=w, batch_size=4, shuffle=False, verbose=0, callbacks=[note])
    # Keras reports the mean since the epoch began.
    np.testing.assert_allclose(reported, np.cumsum(losses) / [1, 2, 3], atol=TOLERANCE)
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (None, {}),
        ({"data": 2}, {"rematerialise": "selective"}),
        ({"tensor": 2}, {}),
        ({"pipe": 2}, {"num_microbatches": 2}),
    ],
)
def test_what_was_traced_is_let_go(mesh, options):
    """Fails if something keeps the graphs of a step that is gone, as TensorFlow's register of
    gradients does: a step that is traced for many lengths would keep one program for each."""
    strategy = MeshStrategy(Mesh(**mesh), **options) if mesh else tf.distribute.get_strategy()
    config = GPTConfig(vocab_size=32, max_positions=8, hidden_size=16, num_heads=2, num_layers=2)
    with strategy.scope():
        model, optimizer = GPT(config), keras.optimizers.SGD()
    before = _graphs()
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    tokens = tf.TensorSpec([4, 8], tf.int32)
    step.get_concrete_function(tokens, tokens)
    assert _graphs().keys() - before.keys()
    del step
    gc.collect()
    assert not _graphs().keys() - before.keys()


def _graphs():
    """Graphs by what tells them apart, held so that it stays so."""
    return {id(x): x for x in gc.get_objects() if isinstance(x, tf.Graph)}
