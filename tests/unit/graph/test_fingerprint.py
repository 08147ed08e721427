"""What two processes compare of a traced function."""

import pytest
import tensorflow as tf

from llmos_tf.graph.fingerprint import op_counts

pytestmark = pytest.mark.fast


def counts(function):
    traced = tf.function(function, autograph=False)
    return op_counts(traced.get_concrete_function(tf.TensorSpec([2])))


def test_the_same_code_has_the_same_ops():
    """Fails if names or numbers of a process count, which a second trace has others of."""

    def function(x):
        y = tf.function(tf.nn.relu)(x)
        y = tf.py_function(lambda x: x, [y], tf.float32)
        return tf.cond(tf.reduce_sum(x) > 0, lambda: 2.0 * y, lambda: tf.exp(x))

    assert counts(function) == counts(function)


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        (tf.nn.relu, tf.nn.tanh, {"Relu T=float32", "Tanh T=float32"}),
        (tf.function(tf.nn.relu), tf.function(tf.nn.tanh), {"Relu T=float32", "Tanh T=float32"}),
        (lambda x: x * 0.5, lambda x: x * 0.25, {"Const dtype=float32 value=0.5"}),
        (lambda x: x[:1], lambda x: x, {"StridedSlice"}),
    ],
)
def test_what_differs_is_named(one, other, difference):
    """Fails if an op, also of an inner function, or a constant is left out."""
    ones, others = counts(one), counts(other)
    unlike = {text for text, _ in ones.items() ^ others.items()}
    for words in difference:
        assert any(text.startswith(words) for text in unlike), unlike
