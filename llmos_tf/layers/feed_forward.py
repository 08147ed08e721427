"""The feed-forward half of a block."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf.layers.dense import Dense
from llmos_tf.layers.dropout import Dropout
from llmos_tf.layers.tensor_region import TensorRegion, in_stream


class FeedForward(keras.layers.Layer):
    """Y = act(X A) B, or gated Y = (act(X A) ∘ X C) B (arXiv 2002.05202).

    A (and C) are cut by columns and B by rows, so that the activation in between, ``[B, T, F/t]``,
    never travels: one region, entered before A and left after B.

    Args:
        hidden_size: D.
        feed_forward_size: F.
        activation: name or function.
        gated: whether to make C.
        use_bias: whether the products have biases.
        dropout: rate after B.
        initializer: of A and C.
        output_initializer: of B.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, of the residual stream.
        training: whether to drop.

    Call returns:
        Tensor like `x`.
    """

    def __init__(
        self,
        hidden_size: int,
        feed_forward_size: int,
        activation: Any = "gelu",
        gated: bool = False,
        use_bias: bool = True,
        dropout: float = 0.0,
        initializer: Any = "glorot_uniform",
        output_initializer: Any = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.activation = keras.activations.get(activation)
        # One matrix for A and C: one product, and one gather of x.
        up_shape = (2, feed_forward_size) if gated else (feed_forward_size,)
        self.gated = gated
        self.up = Dense((hidden_size,), up_shape, use_bias, initializer, name="up")
        self.down = Dense(
            (feed_forward_size,),
            (hidden_size,),
            use_bias,
            output_initializer or initializer,
            name="down",
        )
        self.dropout = Dropout(dropout, name="dropout")

    def build(self, input_shape: Any = None) -> None:
        """Makes the products.

        Args:
            input_shape: not needed.
        """
        self.up.build()
        self.down.build()

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        region = TensorRegion(self.up.kernel)
        hidden = self.up.add_bias(self.up(region.enter(x)))
        if self.gated:
            hidden = self.activation(hidden[..., 0, :]) * hidden[..., 1, :]
        else:
            hidden = self.activation(hidden)
        y = region.leave(self.down(hidden))
        if self.down.bias is not None:
            in_stream(self.down.bias)
        return self.dropout(self.down.add_bias(y), training=training)
