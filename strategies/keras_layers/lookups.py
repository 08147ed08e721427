"""Tables that are cut over `tensor`: Keras's `Embedding` and `ReversibleEmbedding`.

Cut by rows (the vocabulary), a rank looks up the tokens it holds and gives zeros for the others;
the sum over ranks is the embedding (Megatron-LM, arXiv 1909.08053, section 3). Cut by columns, it
looks up its part of each embedding, and the parts are gathered. The logits of a reversible
embedding are a product with the transposed table, cut by columns or by rows.

The gradient of a lookup is sparse, and Keras's adaptive optimizers square each row of it by itself.
So each rank notes the rows for the step, where they are summed as on one device
(`ShardedVariable.sparse_gradient`).
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from llmos_tf import collectives
from llmos_tf.sharding import local_slice
from llmos_tf.sharding.embedding_lookups import note_lookup
from llmos_tf.strategies.keras_layers.products import (
    AXIS,
    cut_dim,
    is_usual,
    reads_of,
    slice_of,
)


def embedding_call(original: Callable) -> Callable:
    """Returns what stands in for `keras.layers.Embedding.call`.

    Args:
        original: Keras's own.

    Returns:
        A function of the layer and its arguments.
    """

    @functools.wraps(original)
    def call(layer, inputs, *args, **kwargs):
        note_lookup(getattr(layer._embeddings, "_value", None), inputs)
        table = _table_of(layer, inputs)
        if cut_dim(table) is None:
            return original(layer, inputs, *args, **kwargs)
        return ops.cast(look_up(table, inputs), layer.compute_dtype)

    return call


def reversible_embedding_call(original: Callable) -> Callable:
    """Returns what stands in for `keras.layers.ReversibleEmbedding.call`.

    Args:
        original: Keras's own, whose lookup is that of `Embedding`.

    Returns:
        A function of the layer and its arguments.
    """

    @functools.wraps(original)
    def call(layer, inputs, reverse=False):
        if not reverse:
            return original(layer, inputs)
        table = _table_of(layer, inputs) if layer.tie_weights else layer.reverse_embeddings
        if cut_dim(table) is None or not is_usual(layer, inputs):
            return original(layer, inputs, reverse=True)
        return _logits(layer, table, inputs)

    return call


def look_up(table: Any, tokens: tf.Tensor) -> tf.Tensor:
    """Rows of a table of which each rank holds a slice.

    Args:
        table: `keras.Variable` of shape ``[V, D]``.
        tokens: integers of any shape, the same on every rank of `tensor`. Negative ones count from
            the end, as in Keras.

    Returns:
        ``[..., D]``, whole on every rank, in the table's dtype.
    """
    if tokens.dtype not in (tf.int32, tf.int64):
        tokens = tf.cast(tokens, tf.int32)
    num_tokens, width = table.shape
    tokens = tf.where(tokens < 0, tokens + num_tokens, tokens)
    by_rows = cut_dim(table) == 0
    if by_rows:
        slice_rows = num_tokens // collectives.axis_size(AXIS)
        local = tokens - tf.cast(collectives.axis_index(AXIS) * slice_rows, tokens.dtype)
        held = (local >= 0) & (local < slice_rows)
        local = tf.where(held, local, 0)
    else:
        local = tokens
    reads, graph = reads_of(table), tf.compat.v1.get_default_graph()

    @tf.custom_gradient
    def rows_of(slice_VD):
        def masked(x):
            return tf.where(held[..., tf.newaxis], x, tf.zeros([], x.dtype)) if by_rows else x

        def gradient(upstream):
            flat = tf.reshape(upstream, [-1, width])
            rows = tf.IndexedSlices(flat, tf.reshape(tokens, [-1]), [num_tokens, width])
            # In a loop, or a block of its own, the rows are not to be had outside of it.
            is_here = tf.compat.v1.get_default_graph() is graph
            reads.append(rows if is_here else None)
            mine = masked(upstream) if by_rows else collectives.split_to_axis(upstream, AXIS)
            mine = tf.reshape(mine, [-1, slice_VD.shape[1]])
            return tf.math.unsorted_segment_sum(mine, tf.reshape(local, [-1]), slice_VD.shape[0])

        x = masked(tf.gather(slice_VD, local))
        leave = collectives.reduce_from_axis if by_rows else collectives.gather_from_axis
        return leave(x, AXIS), gradient

    return rows_of(local_slice(table, for_lookups=True))


def _logits(layer: Any, table: Any, x: tf.Tensor) -> tf.Tensor:
    """Scores of all tokens, X Eᵀ, whole on every rank."""
    # The table is the transposed kernel.
    by_columns = cut_dim(table) == (0 if layer.tie_weights else 1)
    kernel = slice_of(table)
    kernel = tf.transpose(kernel) if layer.tie_weights else kernel
    x = collectives.copy_to_axis(x, AXIS) if by_columns else collectives.split_to_axis(x, AXIS)
    if layer.reverse_dtype is not None:
        x, kernel = ops.cast(x, layer.reverse_dtype), ops.cast(kernel, layer.reverse_dtype)
    logits = ops.matmul(x, kernel)
    if not by_columns:
        logits = collectives.reduce_from_axis(logits, AXIS)
    if layer.logit_soft_cap is not None:
        cap = layer.logit_soft_cap
        logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
    return collectives.gather_from_axis(logits, AXIS) if by_columns else logits


def _table_of(layer: Any, inputs: Any) -> Any:
    """The table of an embedding that is used as it is, or None."""
    is_own = type(layer).embeddings is keras.layers.Embedding.embeddings
    return layer._embeddings if is_own and is_usual(layer, inputs) else None
