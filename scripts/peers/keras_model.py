"""GPT in Keras 3 alone, as a user of it would write it; it runs on each of Keras's backends."""

from collections.abc import Mapping

import keras
import numpy as np
from keras import layers, ops

from llmos_tf.config import GPTConfig
from llmos_tf.scripts.peers.workload import Workload, fused_by_heads


class CausalSelfAttention(layers.Layer):
    """Causal attention with one product for query, key and value.

    Not `keras.layers.MultiHeadAttention`: its three products and its mask made it slower in a step
    of the whole model on TensorFlow's CPU device.

    Args:
        config: sizes.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``.

    Call returns:
        Tensor like `x`.
    """

    def __init__(self, config: GPTConfig, **kwargs):
        super().__init__(**kwargs)
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query_key_value = layers.Dense(3 * config.hidden_size, name="query_key_value")
        self.output_product = layers.Dense(config.hidden_size, name="output")

    def call(self, x):
        batch, length, width = ops.shape(x)
        # By heads first, so that a cut of the product's columns is a cut of heads.
        fused = ops.reshape(
            self.query_key_value(x), (batch, length, self.num_heads, 3, self.head_dim)
        )
        q, k, v = ops.unstack(fused, axis=3)
        y = ops.dot_product_attention(q, k, v, is_causal=True)
        return self.output_product(ops.reshape(y, (batch, length, width)))


class Block(layers.Layer):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: sizes.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``.

    Call returns:
        Tensor like `x`.
    """

    def __init__(self, config: GPTConfig, **kwargs):
        super().__init__(**kwargs)
        epsilon = config.layer_norm_epsilon
        self.attention_norm = layers.LayerNormalization(epsilon=epsilon, name="attention_norm")
        self.attention = CausalSelfAttention(config, name="attention")
        self.feed_forward_norm = layers.LayerNormalization(
            epsilon=epsilon, name="feed_forward_norm"
        )
        self.up = layers.Dense(config.feed_forward_size, name="up")
        self.down = layers.Dense(config.hidden_size, name="down")

    def call(self, x):
        x = x + self.attention(self.attention_norm(x))
        y = ops.gelu(self.up(self.feed_forward_norm(x)), approximate=True)
        return x + self.down(y)


class KerasGPT(keras.Model):
    """GPT-2 with tied embeddings.

    Args:
        config: sizes.
        **kwargs: as for `keras.Model`.

    Call arguments:
        tokens: integers ``[B, T]``.

    Call returns:
        Logits ``[B, T, V]``.
    """

    def __init__(self, config: GPTConfig, **kwargs):
        super().__init__(**kwargs)
        self.token_embedding = layers.Embedding(
            config.vocab_size, config.hidden_size, name="token_embedding"
        )
        self.position_embedding = layers.Embedding(
            config.max_positions, config.hidden_size, name="position_embedding"
        )
        self.blocks = [Block(config, name=f"block_{i}") for i in range(config.num_layers)]
        self.final_norm = layers.LayerNormalization(
            epsilon=config.layer_norm_epsilon, name="final_norm"
        )

    def call(self, tokens):
        x = self.token_embedding(tokens) + self.position_embedding(ops.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return ops.matmul(self.final_norm(x), ops.transpose(self.token_embedding.embeddings))


def make_model(workload: Workload, jit_compile: bool) -> KerasGPT:
    """Makes the model, compiled, with its initial weights.

    Args:
        workload: what is trained.
        jit_compile: whether XLA compiles its steps.

    Returns:
        The model.
    """
    model = KerasGPT(workload.config)
    # Builds all layers.
    model(keras.Input((workload.config.max_positions,), dtype="int32"))
    _load(model, workload.weights())
    model.compile(
        keras.optimizers.AdamW(**workload.optimizer),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    return model


def _load(model: KerasGPT, weights: Mapping[str, np.ndarray]) -> None:

    def dense(layer: layers.Dense, name: str) -> None:
        kernel, bias = weights[f"{name}/kernel"], weights[f"{name}/bias"]
        if name.endswith("query_key_value"):
            kernel, bias = fused_by_heads(kernel), fused_by_heads(bias)
        layer.kernel.assign(kernel.reshape(layer.kernel.shape))
        layer.bias.assign(bias)

    def norm(layer: layers.LayerNormalization, name: str) -> None:
        layer.gamma.assign(weights[f"{name}/gamma"])
        layer.beta.assign(weights[f"{name}/beta"])

    for layer in (model.token_embedding, model.position_embedding):
        layer.embeddings.assign(weights[f"{layer.name}/table"])
    for block in model.blocks:
        norm(block.attention_norm, f"{block.name}/attention_norm")
        norm(block.feed_forward_norm, f"{block.name}/feed_forward_norm")
        dense(block.attention.query_key_value, f"{block.name}/attention/query_key_value")
        dense(block.attention.output_product, f"{block.name}/attention/output")
        dense(block.up, f"{block.name}/feed_forward/up")
        dense(block.down, f"{block.name}/feed_forward/down")
    norm(model.final_norm, "final_norm")
