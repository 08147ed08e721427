"""Which experts a token is sent to, and what keeps the experts equally busy."""

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from llmos_tf.layers.tensor_region import in_stream
from llmos_tf.sharding import local_slice


class Routing(NamedTuple):
    """The choice of a router for each token. Suffixes: E experts, K of them for a token.

    Attributes:
        logits_BTE: scores of all experts; float32 or wider.
        experts_BTK: int32, the chosen experts, best first.
        weights_BTK: of the chosen experts' outputs; of sum 1.
    """

    logits_BTE: tf.Tensor
    experts_BTK: tf.Tensor
    weights_BTK: tf.Tensor


class Router(keras.layers.Layer):
    """Top-k token choice: the K largest of X W, weighted by their softmax.

    The softmax is over the chosen logits alone (Mixtral, arXiv 2401.04088, section 2.1), which are
    float32 or wider: in 16 bits, choices between near experts are noise (Switch Transformer, arXiv
    2101.03961, section 2.4). W is whole on every rank; nothing travels.

    Args:
        hidden_size: D.
        num_experts: E.
        num_experts_per_token: K.
        initializer: of W, ``[D, E]``.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, of the residual stream.

    Call returns:
        A `Routing`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        initializer: Any = "glorot_uniform",
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        if tf.as_dtype(self.compute_dtype).size < 4:
            self.dtype_policy = "float32"
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any = None) -> None:
        """Makes W.

        Args:
            input_shape: not needed.
        """
        self.kernel = self.add_weight(
            name="kernel", shape=(self.hidden_size, self.num_experts), initializer=self.initializer
        )

    def call(self, x: tf.Tensor) -> Routing:
        logits_BTE = tf.einsum("btd,de->bte", x, local_slice(in_stream(self.kernel)))
        best_BTK, experts_BTK = tf.math.top_k(logits_BTE, self.num_experts_per_token)
        return Routing(logits_BTE, experts_BTK, tf.nn.softmax(best_BTK))


def load_balance_loss(logits_BTE: tf.Tensor, share_E: tf.Tensor) -> tf.Tensor:
    """E · Σ_e f_e P_e: 1 where experts are equally busy and likely, E where one has all tokens.

    f_e is the share of choices that fell on expert e, which has no gradient, and P_e the mean of
    its probability, the softmax over all experts.

    Args:
        logits_BTE: of this rank's tokens.
        share_E: f, of the whole batch, so that the loss is a mean over tokens whoever holds them.

    Returns:
        Scalar, the part of this rank's tokens: their mean.

    Reference:
        Fedus et al., Switch Transformers (arXiv 2101.03961), equations 4 to 6. With several
        experts for a token, f counts choices; they are counted before any is dropped.
    """
    probability_E = tf.reduce_mean(tf.nn.softmax(logits_BTE), axis=[0, 1])
    return logits_BTE.shape[-1] * tf.reduce_sum(tf.stop_gradient(share_E) * probability_E)


def router_z_loss(logits_BTE: tf.Tensor) -> tf.Tensor:
    """Mean over tokens of (log Σ_e exp(logit_e))²: keeps logits small, where they are precise.

    Args:
        logits_BTE: of this rank's tokens.

    Returns:
        Scalar.

    Reference:
        Zoph et al., ST-MoE (arXiv 2202.08906), equation 5.
    """
    return tf.reduce_mean(tf.square(tf.reduce_logsumexp(logits_BTE, axis=-1)))
