"""Batch normalization over all ranks' rows where some positions are masked."""

import functools
from typing import Any

import keras
import tensorflow as tf
from keras import ops


def synchronized_moments(original: Any) -> Any:
    """Returns what stands in for `keras.layers.BatchNormalization._moments` in a program.

    Keras synchronizes the moments of a layer with ``synchronized=True`` only where there is no
    mask. With one, each replica would take the mean over its own valid positions.

    Args:
        original: Keras's own.

    Returns:
        A function of the layer, its inputs and their mask, that returns mean and variance.
    """

    @functools.wraps(original)
    def _moments(layer, inputs, mask):
        if mask is None or not layer.synchronized:
            return original(layer, inputs, mask)
        axes = layer._reduction_axes

        def total(x):
            mine = ops.sum(x, axes, keepdims=True)
            replica = tf.distribute.get_replica_context()
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, mine)

        valid = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), -1), ops.shape(inputs))
        count = total(ops.cast(valid, inputs.dtype)) + keras.config.epsilon()
        mean = total(ops.where(valid, inputs, 0)) / count
        variance = total(ops.square(ops.where(valid, inputs - mean, 0))) / count
        return ops.squeeze(mean), ops.squeeze(variance)

    return _moments
