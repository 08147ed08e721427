"""GPT: the GPT-2 architecture (Radford et al. 2019)."""

import math
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.config import GPTConfig
from llmos_tf.layers import (
    Dropout,
    FeedForward,
    LayerNorm,
    PositionEmbedding,
    SelfAttention,
    TokenEmbedding,
)
from llmos_tf.layers.fused import gelu
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.models.layouts import gpt_layouts


class GPTBlock(keras.layers.Layer):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

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

    def __init__(self, config: GPTConfig, name: str | None = None, **kwargs: Any):
        super().__init__(name=name, **kwargs)
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        # Residual products begin smaller, so that the stream's variance does not grow with depth.
        residual = keras.initializers.RandomNormal(stddev=0.02 / math.sqrt(2 * config.num_layers))
        self.hidden_size = config.hidden_size
        self.attention_norm = LayerNorm(epsilon=config.layer_norm_epsilon, name="attention_norm")
        self.attention = SelfAttention(
            config.hidden_size,
            config.num_heads,
            dropout=config.dropout,
            initializer=initializer,
            output_initializer=residual,
            name="attention",
        )
        self.feed_forward_norm = LayerNorm(
            epsilon=config.layer_norm_epsilon, name="feed_forward_norm"
        )
        self.feed_forward = FeedForward(
            config.hidden_size,
            config.feed_forward_size,
            activation=gelu,
            dropout=config.dropout,
            initializer=initializer,
            output_initializer=residual,
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
class GPT(LanguageModel):
    """GPT-2: learned positions, pre-norm blocks, GELU, biases, tied output embedding.

    Args:
        config: a `GPTConfig`.
        name: model name.
        **kwargs: as for `keras.Model`.

    Call arguments:
        tokens: integers ``[B, T]``, and the others, as for `LanguageModel`.

    Call returns:
        Logits ``[B, T, V]``; with a cache, (these, the new cache).

    Example:
        >>> model = GPT(GPTConfig(vocab_size=256, max_positions=64, hidden_size=32, num_heads=4,
        ...                       num_layers=2))
        >>> model(tf.zeros([1, 64], tf.int32)).shape
        TensorShape([1, 64, 256])
    """

    config_class = GPTConfig

    def make_layers(self) -> None:
        """Makes embeddings, blocks and the last norm."""
        config = self.config
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.token_embedding = TokenEmbedding(
            config.vocab_size, config.hidden_size, initializer, name="token_embedding"
        )
        self.position_embedding = PositionEmbedding(
            config.max_positions, config.hidden_size, initializer, name="position_embedding"
        )
        self.dropout = Dropout(config.dropout, name="dropout")
        self.blocks = [GPTBlock(config, name=f"block_{i}") for i in range(config.num_layers)]
        self.final_norm = LayerNorm(epsilon=config.layer_norm_epsilon, name="final_norm")

    def layout_table(self) -> dict[str, Any]:
        """Returns the layouts over a tensor axis; see `models.layouts`."""
        return gpt_layouts(self.config)

    def build(self, input_shape: Any) -> None:
        """Makes all weights.

        Args:
            input_shape: not needed.
        """
        self.token_embedding.build()
        self.position_embedding.build()
        for block in self.blocks:
            block.build()
        self.final_norm.build((None, None, self.config.hidden_size))

    def embed(
        self, tokens: tf.Tensor, training: bool | None, offset: int | tf.Tensor = 0
    ) -> tf.Tensor:
        """Looks up tokens and positions.

        Args:
            tokens: as for `LanguageModel.embed`.
            training: whether to drop.
            offset: position of the first token.

        Returns:
            ``[B, T, D]``.
        """
        x = self.position_embedding(self.token_embedding(tokens), offset=offset)
        return self.dropout(x, training=training)

    def score(self, x_BTD: tf.Tensor) -> tf.Tensor:
        """Scores every token of the vocabulary by its embedding.

        Args:
            x_BTD: the residual stream after the last block.

        Returns:
            Logits, as for `LanguageModel.score`.
        """
        return self.token_embedding.logits(self.final_norm(x_BTD))
