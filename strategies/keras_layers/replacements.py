"""Which methods of Keras's layers are replaced while a program is traced."""

import sys
from collections.abc import Callable
from typing import Any

import keras

from llmos_tf.strategies.keras_layers.attention import HeadRegions
from llmos_tf.strategies.keras_layers.lookups import embedding_call, reversible_embedding_call
from llmos_tf.strategies.keras_layers.normalization import synchronized_moments
from llmos_tf.strategies.keras_layers.products import dense_call


def layer_replacements() -> dict[tuple[Any, str], Callable]:
    """Returns the replacements for one program, as `_internal.patched` takes them.

    Returns:
        Maps (layer class, method) to a function of Keras's method that returns its replacement.
    """
    regions = HeadRegions()
    replacements = {
        (keras.layers.Dense, "call"): dense_call,
        (keras.layers.EinsumDense, "call"): regions.einsum_dense_call,
        (keras.layers.Embedding, "call"): embedding_call,
        (keras.layers.ReversibleEmbedding, "call"): reversible_embedding_call,
        (keras.layers.Dropout, "call"): regions.dropout_call,
        (keras.layers.BatchNormalization, "_moments"): synchronized_moments,
    }
    for attention in (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention):
        replacements[attention, "call"] = regions.attention_call
        replacements[attention, "_compute_attention"] = regions.compute_attention
    if "keras_hub" in sys.modules:
        # A MultiHeadAttention with a `call` of its own.
        cached = sys.modules["keras_hub"].layers.CachedMultiHeadAttention
        replacements[cached, "call"] = regions.attention_call
    return replacements
