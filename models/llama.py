"""Llama (arXiv 2302.13971, 2307.09288, 2407.21783)."""

from typing import Any, ClassVar

import keras
import tensorflow as tf

from llmos_tf.config import LlamaConfig
from llmos_tf.layers import Dropout, FeedForward, RMSNorm, SelfAttention, TokenEmbedding
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.models.layouts import llama_layouts
from llmos_tf.sharding import mesh_axis_size


class LlamaBlock(keras.layers.Layer):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), without biases.

    Args:
        config: sizes.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, of the residual stream.
        training: whether to drop.
        cache: as for `SelfAttention`.
        offset: as for `SelfAttention`.
        segment_ids: as for `SelfAttention`.

    Call returns:
        Tensor like `x`; with a cache, (that, the new cache).
    """

    def __init__(self, config: LlamaConfig, name: str | None = None, **kwargs: Any):
        super().__init__(name=name, **kwargs)
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.hidden_size = config.hidden_size
        self.attention_norm = RMSNorm(config.rms_norm_epsilon, name="attention_norm")
        self.attention = SelfAttention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            use_bias=False,
            rope_theta=config.rope_theta,
            dropout=config.dropout,
            initializer=initializer,
            name="attention",
        )
        self.feed_forward_norm = RMSNorm(config.rms_norm_epsilon, name="feed_forward_norm")
        self.feed_forward = self.make_feed_forward(config, initializer)

    def make_feed_forward(self, config: LlamaConfig, initializer: Any) -> keras.layers.Layer:
        """Makes the second half of the block, which is another one in Mixtral.

        Args:
            config: sizes.
            initializer: of its kernels.

        Returns:
            The layer.
        """
        return FeedForward(
            config.hidden_size,
            config.feed_forward_size,
            activation=config.activation,
            gated=True,
            use_bias=False,
            dropout=config.dropout,
            initializer=initializer,
            name="feed_forward",
        )

    def build(self, input_shape: Any = None) -> None:
        """Makes the weights.

        Args:
            input_shape: not needed.
        """
        self.attention_norm.build((None, None, self.hidden_size))
        self.attention.build()
        self.feed_forward_norm.build((None, None, self.hidden_size))
        self.feed_forward.build()

    def call(
        self,
        x: tf.Tensor,
        training: bool | None = None,
        cache: tf.Tensor | None = None,
        offset: int | tf.Tensor = 0,
        segment_ids: tf.Tensor | None = None,
    ) -> Any:
        y = self.attention(
            self.attention_norm(x),
            training=training,
            cache=cache,
            offset=offset,
            segment_ids=segment_ids,
        )
        if cache is not None:
            y, cache = y
        x += y
        x += self.feed_forward(self.feed_forward_norm(x), training=training)
        return x if cache is None else (x, cache)


@keras.saving.register_keras_serializable(package="llmos_tf")
class Llama(LanguageModel):
    """Llama: RMS norm, rotary positions, grouped-query attention, gated feed-forward.

    Args:
        config: a `LlamaConfig`.
        name: model name.
        **kwargs: as for `keras.Model`.

    Call arguments:
        tokens: integers ``[B, T]``, and the others, as for `LanguageModel`.

    Call returns:
        Logits ``[B, T, V]``; with a cache, (these, the new cache).
    """

    config_class = LlamaConfig
    block_class: ClassVar[type[LlamaBlock]] = LlamaBlock

    def make_layers(self) -> None:
        """Makes embeddings, blocks and the last norm."""
        config = self.config
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.token_embedding = TokenEmbedding(
            config.vocab_size, config.hidden_size, initializer, name="token_embedding"
        )
        self.output_embedding = (
            self.token_embedding
            if config.tie_embeddings
            else TokenEmbedding(
                config.vocab_size, config.hidden_size, initializer, name="output_embedding"
            )
        )
        self.dropout = Dropout(config.dropout, name="dropout")
        self.blocks = [
            self.block_class(config, name=f"block_{i}") for i in range(config.num_layers)
        ]
        self.final_norm = RMSNorm(config.rms_norm_epsilon, name="final_norm")

    def layout_table(self) -> dict[str, Any]:
        """Returns the layouts over a tensor axis; see `models.layouts`."""
        return llama_layouts(self.config, mesh_axis_size("tensor"))

    def build(self, input_shape: Any) -> None:
        """Makes all weights.

        Args:
            input_shape: not needed.
        """
        self.token_embedding.build()
        if not self.config.tie_embeddings:
            self.output_embedding.build()
        for block in self.blocks:
            block.build()
        self.final_norm.build((None, None, self.config.hidden_size))

    def embed(
        self, tokens: tf.Tensor, training: bool | None, offset: int | tf.Tensor = 0
    ) -> tf.Tensor:
        """Looks up tokens; positions come in by the rotation of queries and keys.

        Args:
            tokens: as for `LanguageModel.embed`.
            training: whether to drop.
            offset: not needed.

        Returns:
            ``[B, T, D]``.
        """
        del offset
        return self.dropout(self.token_embedding(tokens), training=training)

    def score(self, x_BTD: tf.Tensor) -> tf.Tensor:
        """Scores every token of the vocabulary.

        Args:
            x_BTD: the residual stream after the last block.

        Returns:
            Logits, as for `LanguageModel.score`.
        """
        return self.output_embedding.logits(self.final_norm(x_BTD))
