"""Fused functions against TensorFlow's own ops and gradients, compiled and op by op.

Each fails if a formula, or its gradient by hand, is wrong: compiled or not they are the same
functions, and must give the same numbers.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.graph import fusion
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.layers.fused import gelu, layer_norm, rms_norm

pytestmark = pytest.mark.fast


@pytest.fixture(params=["compiled", "op by op"])
def size_to_compile(request, monkeypatch):
    """Compiles everything, or nothing."""
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 0 if request.param == "compiled" else 10**9)


def _random(*shape):
    return tf.constant(np.random.default_rng(sum(shape)).normal(size=shape))


def _assert_same(mine, theirs, *inputs):
    """Compares results and gradients of two functions."""
    for one, other in zip(_both(mine, inputs), _both(theirs, inputs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-10)


def _both(function, inputs):
    def run(*values):
        with tf.GradientTape() as tape:
            tape.watch(values)
            y = function(*values)
            # Another weight for each element, or a gradient summed twice would not be seen.
            total = tf.reduce_sum(y * tf.reshape(tf.range(tf.size(y), dtype=y.dtype), y.shape))
        return [y, *tape.gradient(total, values)]

    return tf.function(run, autograph=False)(*inputs)


def test_gelu(size_to_compile):
    def by_its_definition(x):
        return 0.5 * x * (1 + tf.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    _assert_same(gelu, by_its_definition, 3 * _random(2, 3, 5))


def test_layer_norm(size_to_compile):
    def by_its_definition(x, scale, shift):
        mean, variance = tf.nn.moments(x, [-1], keepdims=True)
        return (x - mean) / tf.sqrt(variance + 0.1) * scale + shift

    def mine(x, scale, shift):
        return layer_norm(x, scale, shift, tf.constant(0.1, x.dtype))

    _assert_same(mine, by_its_definition, _random(2, 3, 5), _random(5), _random(1, 5)[0])


def test_root_mean_square_norm(size_to_compile):
    def by_its_definition(x, scale):
        return x / tf.sqrt(tf.reduce_mean(x**2, -1, keepdims=True) + 0.1) * scale

    def mine(x, scale):
        return rms_norm(x, scale, tf.constant(0.1, x.dtype))

    _assert_same(mine, by_its_definition, _random(2, 3, 5), _random(5))


def test_cross_entropy(size_to_compile):
    labels = tf.constant([[1, 0, 6], [2, 2, 5]])

    def mine(logits):
        return TokenCrossEntropy(reduction=None, dtype="float64")(labels, logits)

    def by_its_definition(logits):
        return -tf.gather(tf.nn.log_softmax(logits), labels, batch_dims=2)

    _assert_same(mine, by_its_definition, 30 * _random(2, 3, 7))


@pytest.mark.parametrize("label", [-1, 7])
def test_a_label_that_there_is_not_is_refused(monkeypatch, label):
    """Fails if it is taken for another token's, as XLA does with an index out of bounds."""
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"= {label} is not in"):
        TokenCrossEntropy()(tf.constant([[label, 0]]), tf.zeros([1, 2, 7]))


def test_half_precision_is_computed_in_float32(monkeypatch):
    """Fails if the mean square is taken in float16, whose largest number is 65,504."""
    monkeypatch.setattr(fusion, "MIN_ELEMENTS", 0)
    keras.config.set_dtype_policy("mixed_float16")
    x = tf.fill([1, 64], tf.constant(1000.0, tf.float16))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = rms_norm(x, tf.ones([64], tf.float16), tf.constant(1e-5))
    assert y.dtype == tape.gradient(y, x).dtype == tf.float16
    np.testing.assert_allclose(y, 1.0, atol=1e-3)


def test_only_what_is_large_is_compiled():
    """Fails if every small model waits for XLA, or if unknown rows keep a large one from it."""
    spec = tf.TensorSpec([None, 128, 256])

    @tf.function(autograph=False, input_signature=[spec, tf.TensorSpec([4, 8])])
    def two(large, small):
        return gelu(large), gelu(small)

    graph = two.get_concrete_function().graph.as_graph_def()
    called = [node.op for node in graph.node]
    assert called.count("PartitionedCall") == 1
    assert called.count("Sigmoid") == 1
