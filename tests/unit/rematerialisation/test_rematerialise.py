"""What is computed again in the backward pass gives the gradients of what is kept."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from lanes import usual

from llmos_tf import Mesh, collectives, devices
from llmos_tf.config import LlamaConfig
from llmos_tf.memory import rematerialised
from llmos_tf.models import Llama
from llmos_tf.spmd.global_trace import current_trace
from llmos_tf.spmd.program import current_program
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy, ZeroStrategy
from llmos_tf.testing import max_difference, train

TOLERANCE = 1e-9
_rng = np.random.default_rng(0)
TOKENS = _rng.integers(1, 20, (9, 7))
# Some tokens are padding, and the last batch has one row.
TOKENS[:, 5:] *= _rng.integers(0, 2, (9, 2))
LABELS = _rng.integers(0, 3, 9)
BATCHES = [(TOKENS[i : i + 4], LABELS[i : i + 4]) for i in (0, 4, 8)]


def two(kind, **options):
    return kind(devices=devices.visible_devices()[:2], **options)


STRATEGIES = {
    "data2": lambda: two(DataParallelStrategy),
    "zero3-2": lambda: two(ZeroStrategy, stage=3),
}


def classifier():
    """Masks, a loop, statistics, a loss of an activation, a sparse gradient, and an activation
    behind which the loss looks."""
    model = keras.Sequential(
        [
            layers.Embedding(20, 5, mask_zero=True),
            layers.GRU(4, return_sequences=True),
            layers.BatchNormalization(synchronized=True),
            layers.Dense(4, activation="tanh", activity_regularizer="l2"),
            layers.GlobalAveragePooling1D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("adamw", "sparse_categorical_crossentropy")
    return model


def rematerialised_classifier():
    with keras.RematScope("full"):
        return classifier()


@pytest.mark.parametrize("name", usual(STRATEGIES, "zero3-2"))
def test_remat_scope_has_the_weights_of_one_device(float64, name):
    """Fails if the second call sees other values, if its collectives meet those of the first, if a
    mask, a loss or a sparse gradient is lost, or if a rank without rows counts."""
    expected = train(classifier, BATCHES)
    actual = train(rematerialised_classifier, BATCHES, STRATEGIES[name]())
    assert max_difference(expected, actual) <= TOLERANCE
    np.testing.assert_allclose(actual.losses, expected.losses, atol=TOLERANCE)


class Counting(layers.Layer):
    """A residual branch with dropout and a count, which `keras.remat` computes again or not."""

    def __init__(self, again):
        super().__init__()
        self.up, self.dropout = layers.Dense(8, activation="gelu"), layers.Dropout(0.4)
        self.down = layers.Dense(6)
        self.branch = keras.remat(self.inner) if again else self.inner
        self.runs = []

    def build(self, shape):
        self.calls = self.add_weight(
            name="calls", dtype="int32", initializer="zeros", trainable=False
        )

    def inner(self, x, scale=1.0, training=None):
        self.calls.assign_add(1)

        def note(y):
            self.runs.append(1)
            return y

        y = self.up(x)
        y = y + tf.stop_gradient(tf.numpy_function(note, [y], y.dtype, stateful=False) - y)
        return self.down(self.dropout(tf.ensure_shape(y, [None, 8]), training=training)) * scale

    def call(self, x, training=None):
        if current_trace() is not None:
            # Written for a rank: a step that is partitioned takes no Python.
            collectives.axis_size("data")
        return x + self.branch(x, scale=0.5, training=training)


def train_counting(again, strategy):
    features = _features()
    made = []

    def build():
        made.extend([Counting(again), Counting(again)])
        model = keras.Sequential([*made, layers.Dense(1)])
        model.compile("adam", "mse")
        return model

    batches = [(features[i : i + 4], features[i : i + 4, :1]) for i in (0, 4)]
    result = train(build, batches, strategy)
    counts = [int(layer.calls.numpy()) for layer in made]
    return result, counts, [len(layer.runs) for layer in made]


def _features():
    return np.random.default_rng(1).normal(size=(8, 6))


@pytest.mark.parametrize("name", usual(STRATEGIES, "data2"))
def test_second_call_draws_the_same_masks_and_changes_nothing(float64, name):
    """Fails if dropout draws another mask the second time, if the state of a layer is changed
    twice, or if nothing is computed again at all."""
    kept, counts, runs = train_counting(False, STRATEGIES[name]())
    again, counts_again, runs_again = train_counting(True, STRATEGIES[name]())
    # The same ops on the same numbers; the order of sums in another program may differ.
    assert max_difference(kept, again) <= 1e-14
    assert counts_again == counts == [2, 2]
    # Two steps on two devices, and the same again.
    assert runs == [4, 4]
    assert runs_again == [8, 8]


def llama():
    model = Llama(
        LlamaConfig(
            vocab_size=24,
            max_positions=8,
            hidden_size=8,
            num_heads=4,
            num_kv_heads=2,
            num_layers=2,
            feed_forward_size=12,
        )
    )
    model.compile("adamw", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture
def blocks_again(monkeypatch):
    """Has every block of a model compute its activations again, as a user's subclass would."""
    kind = type(llama().blocks[0])
    original = kind.call
    calls = []

    def call(block, *args, **kwargs):
        if current_program() is not None:
            calls.append(block.name)
        return rematerialised(original.__get__(block))(*args, **kwargs)

    monkeypatch.setattr(kind, "call", call)
    return calls


@pytest.mark.parametrize("sequence_parallel", usual([False, True], False))
def test_collectives_of_a_block_run_again(float64, blocks_again, sequence_parallel):
    """Fails if the collectives of the second call meet those of the first (a deadlock, or another
    rank's numbers), or if a tensor-parallel block has another gradient the second time."""
    tokens = np.random.default_rng(2).integers(0, 24, (8, 9))
    batches = [(tokens[i : i + 4, :-1], tokens[i : i + 4, 1:]) for i in (0, 4)]
    expected = train(llama, batches)
    assert not blocks_again
    mesh = Mesh(fsdp=2, tensor=2, devices=devices.visible_devices()[:4])
    strategy = MeshStrategy(mesh, sequence_parallel=sequence_parallel)
    actual = train(llama, batches, strategy)
    assert len(blocks_again) == 2
    assert max_difference(expected, actual) <= TOLERANCE


def test_blocks_within_blocks():
    """Fails if a collective in two blocks has one key in two of its three runs, so that a rank
    that is ahead would meet one that is behind."""
    strategy = two(DataParallelStrategy)
    keys = []

    def inner(x):
        y = collectives.all_reduce(x * x, "data")
        key = current_program().instance_key(("data",))
        tf.numpy_function(lambda key: keys.append(int(key)) or key, [key], tf.int32)
        return y

    def gradient():
        x = 2.0 + tf.cast(collectives.axis_index("data"), tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = rematerialised(lambda x: 3.0 * rematerialised(inner)(x))(x)
        return tape.gradient(y, x)

    results = strategy.run(gradient)
    # d/dx_i of the sum over ranks of 3 (x_0² + x_1²).
    assert [float(value) for value in results.values] == [2 * 3 * 2 * 2.0, 2 * 3 * 2 * 3.0]
    # Three runs, the same on both ranks.
    assert len(keys) == 6
    assert len(set(keys)) == 3


def test_one_tensor_as_two_arguments():
    """Fails if each argument gets the gradient of both."""

    def gradient():
        x = tf.constant(3.0)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = rematerialised(lambda a, b: a * b)(x, x)
        return tape.gradient(y, x)

    strategy = two(DataParallelStrategy)
    assert [float(value) for value in strategy.run(gradient).values] == [6.0, 6.0]


def assigning_in_a_loop(variable):
    return lambda x: tf.map_fn(lambda row: variable.assign_add(1.0) + row, x)


def returning_a_module(variable):
    del variable
    return lambda x: keras.tree


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (assigning_in_a_loop, "it assigns the variable .* in a loop"),
        (returning_a_module, "it returns a module"),
    ],
)
def test_what_cannot_run_twice_runs_once_and_says_so(function, reason):
    """Fails if state is changed twice, or if memory is kept without a word."""
    strategy = two(DataParallelStrategy)
    with strategy.scope():
        variable = tf.Variable(0.0, trainable=False)

    def step():
        x = tf.ones([3])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = rematerialised(function(variable))(x)
        return tape.gradient(y, x) if isinstance(y, tf.Tensor) else x

    with pytest.warns(UserWarning, match=f"is not rematerialised, because {reason}"):
        strategy.run(step)
    assert variable.numpy() == (3.0 if function is assigning_in_a_loop else 0.0)
