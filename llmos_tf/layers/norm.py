"""Normalization in the residual stream: Keras's layers, that know of split positions."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf.layers.fused import layer_norm, rms_norm
from llmos_tf.layers.tensor_region import in_stream


class LayerNorm(keras.layers.LayerNormalization):
    """Layer normalization (arXiv 1607.06450) of a residual stream whose positions may be split.

    Call arguments:
        inputs: ``[B, T, D]``, or this rank's ``[B, T/t, D]``.

    Call returns:
        Tensor like the input.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        in_stream(self.gamma)
        in_stream(self.beta)
        return layer_norm(
            inputs,
            tf.convert_to_tensor(self.gamma),
            tf.convert_to_tensor(self.beta),
            tf.constant(self.epsilon, _wide(inputs.dtype)),
        )


class RMSNorm(keras.layers.Layer):
    """y = x / sqrt(mean(x²) + ε) · g, root mean square normalization (arXiv 1910.07467).

    The mean is taken in float32 at least, whatever the compute dtype.

    Args:
        epsilon: ε.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, or this rank's ``[B, T/t, D]``.

    Call returns:
        Tensor like `x`.
    """

    def __init__(self, epsilon: float = 1e-5, name: str | None = None, **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        """Makes the scale g, ``[D]``.

        Args:
            input_shape: its last dimension is D.
        """
        self.scale = self.add_weight(name="scale", shape=(input_shape[-1],), initializer="ones")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        scale = tf.convert_to_tensor(in_stream(self.scale))
        return rms_norm(x, scale, tf.constant(self.epsilon, _wide(x.dtype)))


def _wide(dtype: tf.DType) -> tf.DType:
    return tf.float32 if dtype.size < 4 else dtype
