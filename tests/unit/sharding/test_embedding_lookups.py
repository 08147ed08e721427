"""Positions and tokens are told apart."""

import keras
import pytest
import tensorflow as tf

from llmos_tf.sharding.embedding_lookups import are_positions

pytestmark = pytest.mark.fast

TOKENS = tf.TensorSpec([None, 5], tf.int32)
LONG = tf.TensorSpec([None, None], tf.int32)

CASES = {
    # function of the tokens, whether each number is there once and for all ranks
    "constant": (lambda x: tf.constant([3, 1, 2]), True),
    "range": (lambda x: tf.range(5), True),
    "range of an unknown length": (lambda x: tf.range(tf.shape(x)[1]), True),
    "keras range": (lambda x: keras.ops.arange(0, keras.ops.shape(x)[-1]), True),
    "with a dimension for the batch": (lambda x: tf.range(tf.shape(x)[1])[tf.newaxis], True),
    "another type": (lambda x: tf.cast(tf.range(5), tf.int64), True),
    "moved by an offset": (lambda x: tf.range(tf.shape(x)[1]) + 3, True),
    "negative from the end": (
        lambda x: tf.where(tf.range(tf.shape(x)[1]) < 0, tf.range(5) + 9, tf.range(5)),
        True,
    ),
    "tokens": (lambda x: x, False),
    "constant with a repetition": (lambda x: tf.constant([1, 2, 1]), False),
    "repeated for each row": (
        lambda x: tf.tile(tf.range(5)[tf.newaxis], [tf.shape(x)[0], 1]),
        False,
    ),
    "the first of them": (lambda x: tf.range(9)[: tf.shape(x)[1]], True),
    "moved by one token": (lambda x: tf.range(tf.shape(x)[1]) + x[0, 0], False),
    "cut by a token": (lambda x: tf.range(9)[: x[0, 0]], False),
    "moved by tokens": (lambda x: tf.range(5) + x[0], False),
    "halved": (lambda x: tf.range(tf.shape(x)[1]) // 2, False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spec", [TOKENS, LONG], ids=["static", "dynamic"])
def test_positions(name, spec):
    """Fails if rows that one device has one by one are added up, or the other way round."""
    function, expected = CASES[name]
    found = []
    tf.function(lambda x: found.append(are_positions(function(x)))).get_concrete_function(spec)
    assert found == [expected]
