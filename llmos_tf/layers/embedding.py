"""Token embedding, its use as output layer, and learned positions."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.layers.matrix_products import product_by_rows
from llmos_tf.layers.tensor_region import AXIS, TensorRegion, in_stream, stream_positions
from llmos_tf.sharding import layout_of, local_slice
from llmos_tf.spmd.program import current_program


class TokenEmbedding(keras.layers.Layer):
    """Vocabulary-parallel embedding E, and the logits X Eᵀ.

    Cut along the vocabulary, a rank looks up the tokens it holds and gives zeros for the others;
    the sum over ranks is the embedding (Megatron-LM, arXiv 1909.08053, section 3). As an output
    layer it gives each rank the logits of its own tokens, ``[B, T, V/t]``, which stay there where
    the loss can use them so (`layers.TokenCrossEntropy`) and are gathered elsewhere. A vocabulary
    that t does not divide is padded; a padding token's logit is the least number there is.

    Args:
        vocab_size: V.
        hidden_size: D.
        initializer: of E.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        tokens: integers ``[B, T]``.

    Call returns:
        ``[B, T, D]``, of the residual stream.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        initializer: Any = "uniform",
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any = None) -> None:
        """Makes the table E, ``[V, D]``.

        Args:
            input_shape: not needed.
        """
        self.table = self.add_weight(
            name="table", shape=(self.vocab_size, self.hidden_size), initializer=self.initializer
        )

    def call(self, tokens: tf.Tensor) -> tf.Tensor:
        region = TensorRegion(self.table)
        table_VD = local_slice(self.table)
        if not _is_cut_by_rows(self.table):
            return region.leave(_look_up(table_VD, tokens))
        local = tf.cast(tokens, tf.int32) - collectives.axis_index(AXIS) * table_VD.shape[0]
        held = (local >= 0) & (local < table_VD.shape[0])
        x_BTD = _look_up(table_VD, tf.where(held, local, 0))
        return region.leave(tf.where(held[..., tf.newaxis], x_BTD, tf.zeros((), x_BTD.dtype)))

    def logits(self, x_BTD: tf.Tensor) -> tf.Tensor:
        """Scores every token of the vocabulary: X Eᵀ.

        Args:
            x_BTD: the residual stream after the last norm.

        Returns:
            ``[B, T, V]``; ``[B, T, V/t]`` where the program allows sharded logits.
        """
        region = TensorRegion(self.table)
        x_BTD = region.enter(x_BTD)
        table_VD = local_slice(self.table)
        shape = tf.shape(x_BTD)
        flat = product_by_rows(tf.reshape(x_BTD, [-1, self.hidden_size]), table_VD)
        logits_BTV = tf.reshape(flat, [shape[0], shape[1], table_VD.shape[0]])
        logits_BTV.set_shape([x_BTD.shape[0], x_BTD.shape[1], None])
        if not _is_cut_by_rows(self.table):
            return logits_BTV
        program = current_program()
        if program.sharded_logits:
            program.logits_axis = AXIS
            return _without_padding(logits_BTV, self.vocab_size)
        gathered = collectives.gather_from_axis(logits_BTV, AXIS, dim=-1)
        return gathered[..., : self.vocab_size]


class PositionEmbedding(keras.layers.Layer):
    """Learned absolute positions: x + P[positions].

    Args:
        max_positions: number of positions.
        hidden_size: D.
        initializer: of P.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, of the residual stream.
        offset: position of the first entry; int32 scalar.

    Call returns:
        Tensor like `x`.
    """

    def __init__(
        self,
        max_positions: int,
        hidden_size: int,
        initializer: Any = "uniform",
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.max_positions = max_positions
        self.hidden_size = hidden_size
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any = None) -> None:
        """Makes the table P, ``[max_positions, D]``.

        Args:
            input_shape: not needed.
        """
        self.table = self.add_weight(
            name="table", shape=(self.max_positions, self.hidden_size), initializer=self.initializer
        )

    def call(self, x: tf.Tensor, offset: int | tf.Tensor = 0) -> tf.Tensor:
        length = x.shape[1] if x.shape[1] is not None else tf.shape(x)[1]
        table = local_slice(in_stream(self.table))
        return x + _look_up(table, stream_positions(length) + offset)


@tf.custom_gradient
def _look_up(table: tf.Tensor, indices: tf.Tensor) -> tf.Tensor:
    """Rows of a table, with a dense gradient.

    `tf.gather` has a sparse one, by which Keras's adaptive optimizers square the gradient of each
    token by itself and not their sum.
    """

    def gradient(upstream):
        rows = tf.reshape(upstream, [-1, table.shape[1]])
        return tf.math.unsorted_segment_sum(rows, tf.reshape(indices, [-1]), table.shape[0]), None

    return tf.gather(table, indices), gradient


def _is_cut_by_rows(table: Any) -> bool:
    layout = layout_of(table)
    return layout is not None and layout.dims[0] == AXIS


def _without_padding(logits_BTV: tf.Tensor, vocab_size: int) -> tf.Tensor:
    """Takes the tokens that only fill up the last rank's slice out of the running."""
    width = logits_BTV.shape[-1]
    if width * collectives.axis_size(AXIS) == vocab_size:
        return logits_BTV
    token = collectives.axis_index(AXIS) * width + tf.range(width)
    return tf.where(token < vocab_size, logits_BTV, logits_BTV.dtype.min)
