"""Causal self-attention with heads split over the `tensor` axis."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.layers.activation_sharding import current_stream
from llmos_tf.layers.blockwise_attention import blockwise_attention, plain_attention
from llmos_tf.layers.dense import Dense
from llmos_tf.layers.dropout import Dropout
from llmos_tf.layers.masks import Mask, WeightDropout
from llmos_tf.layers.online_softmax import BLOCK
from llmos_tf.layers.ring_attention import ring_attention, ulysses_attention
from llmos_tf.layers.rotary import rotate
from llmos_tf.layers.tensor_region import AXIS, TensorRegion, in_stream, region_positions
from llmos_tf.sharding import layout_of, mark_partial_gradient
from llmos_tf.spmd.program import current_program


class SelfAttention(keras.layers.Layer):
    """softmax(Q Kᵀ / sqrt(H) + causal mask) V, then the output product.

    The query, key and value products are cut by heads (columns) and the output product by heads
    (rows), so a rank attends with its own N/t heads and nothing travels between
    (arXiv 1909.08053). With fewer key-value heads than query heads (grouped-query attention, arXiv
    2305.13245) each serves N/K query heads; where t does not divide K, key and value products are
    whole on every rank, which takes the heads that its query heads need.

    Where the stream is split along positions (`layers.activation_sharding`), a rank has the
    queries, keys and values of its own, and sees the others by `layers.ring_attention`. A row of
    1,024 positions or more is attended to by blocks (`layers.blockwise_attention`), a shorter one,
    and a cache, by one matrix of scores.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K, a divisor of N; None for N.
        head_dim: H; None for D / N.
        use_bias: whether the products have biases.
        rope_theta: base of rotary positions, or None for none.
        dropout: rate on attention weights and on the output.
        initializer: of the query, key and value products.
        output_initializer: of the output product.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, of the residual stream.
        training: whether to drop.
        cache: key and value of earlier positions ``[2, B, K', S, H]`` with S positions in all and
            K' this rank's key-value heads, or None.
        offset: position of the first of the T entries in the cache; int32 scalar.
        segment_ids: integers ``[B, T]``, the document that each entry is of, where a row holds
            several: it sees only those of its own. Not with a cache.

    Call returns:
        Tensor like `x`; with a cache, (that, the cache with the T entries written).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = True,
        rope_theta: float | None = None,
        dropout: float = 0.0,
        initializer: Any = "glorot_uniform",
        output_initializer: Any = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        self.rope_theta = rope_theta
        heads = (self.num_heads, self.head_dim)
        self.is_grouped = self.num_kv_heads != self.num_heads
        if self.is_grouped:
            kv_shape = (2, self.num_kv_heads, self.head_dim)
            self.query = Dense((hidden_size,), heads, use_bias, initializer, name="query")
            self.key_value = Dense(
                (hidden_size,), kv_shape, use_bias, initializer, name="key_value"
            )
        else:
            self.query_key_value = Dense(
                (hidden_size,), (3, *heads), use_bias, initializer, name="query_key_value"
            )
        self.output_product = Dense(
            heads, (hidden_size,), use_bias, output_initializer or initializer, name="output"
        )
        self.weight_dropout = Dropout(dropout, split_over_tensor=True, name="weight_dropout")
        self.dropout = Dropout(dropout, name="dropout")

    def build(self, input_shape: Any = None) -> None:
        """Makes the products.

        Args:
            input_shape: not needed.
        """
        for product in self._input_products():
            product.build()
        self.output_product.build()

    def call(
        self,
        x: tf.Tensor,
        training: bool | None = None,
        cache: tf.Tensor | None = None,
        offset: int | tf.Tensor = 0,
        segment_ids: tf.Tensor | None = None,
    ) -> Any:
        region = TensorRegion(self.output_product.kernel)
        q_BTNH, k_BTKH, v_BTKH = self._project(region.enter(x))
        length = q_BTNH.shape[1] if q_BTNH.shape[1] is not None else tf.shape(q_BTNH)[1]
        positions = region_positions(length) + offset
        if self.rope_theta is not None:
            q_BTNH = rotate(q_BTNH, positions, self.rope_theta)
            k_BTKH = rotate(k_BTKH, positions, self.rope_theta)
        q = tf.transpose(q_BTNH, [0, 2, 1, 3])
        k = tf.transpose(k_BTKH, [0, 2, 1, 3])
        v = tf.transpose(v_BTKH, [0, 2, 1, 3])
        if cache is not None:
            cache = _write_cache(cache, tf.stack([k, v]), offset)
            k, v = cache[0], cache[1]
        if self._kv_is_whole_but_query_cut():
            k, v = self._heads_for_my_queries(q.shape[1], k, v)
        if cache is None:
            o_BNTH = self._attend(q, k, v, positions, segment_ids, training)
        else:
            mask = Mask(positions, tf.range(tf.shape(k)[2]))
            o_BNTH = plain_attention(q, k, v, mask, self._drop(training))
        y = region.leave(self.output_product(tf.transpose(o_BNTH, [0, 2, 1, 3])))
        if self.output_product.bias is not None:
            in_stream(self.output_product.bias)
        y = self.dropout(self.output_product.add_bias(y), training=training)
        return y if cache is None else (y, cache)

    def cache_heads(self) -> int:
        """Returns the number of key-value heads that the cache of one rank holds."""
        product = self._input_products()[-1]
        layout = layout_of(product.kernel)
        if layout is None or AXIS not in layout.dims:
            return self.num_kv_heads
        return self.num_kv_heads // collectives.axis_size(AXIS)

    def _input_products(self) -> list[Dense]:
        return [self.query, self.key_value] if self.is_grouped else [self.query_key_value]

    def _project(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        if not self.is_grouped:
            product = self.query_key_value
            return tuple(tf.unstack(product.add_bias(product(x)), axis=2))
        q = self.query.add_bias(self.query(x))
        if self._kv_is_whole_but_query_cut():
            # Each rank uses some of the heads for its own queries: a part of their gradient.
            for weight in (self.key_value.kernel, self.key_value.bias):
                if weight is not None:
                    mark_partial_gradient(weight, AXIS)
        k, v = tf.unstack(self.key_value.add_bias(self.key_value(x)), axis=2)
        return q, k, v

    def _kv_is_whole_but_query_cut(self) -> bool:
        if not self.is_grouped or layout_of(self.query.kernel) is None:
            return False
        query, kv = layout_of(self.query.kernel), layout_of(self.key_value.kernel)
        return AXIS in query.dims and (kv is None or AXIS not in kv.dims)

    def _attend(self, q_BNTH, k_BKTH, v_BKTH, positions_T, segments_BT, training) -> tf.Tensor:
        """Attention of N query heads to K key-value heads, for each of which there are N/K."""
        stream, length = current_stream(), k_BKTH.shape[2]
        is_split = stream is not None and bool(stream.position_axes)
        mask = Mask(positions_T, positions_T, segments_BT, segments_BT)
        # Fewer keys than a block are as fast with their scores in one matrix, and in fewer ops.
        if not is_split and (length is None or length < BLOCK):
            return plain_attention(q_BNTH, k_BKTH, v_BKTH, mask, self._drop(training))
        layer, dropout = self.weight_dropout, None
        if training and layer.rate > 0:
            dropout = WeightDropout(layer.rate, layer.next_seed())
        if not is_split:
            return blockwise_attention(q_BNTH, k_BKTH, v_BKTH, mask, dropout, in_order=True)
        over_ranks = ring_attention if stream.zigzag else ulysses_attention
        return over_ranks(q_BNTH, k_BKTH, v_BKTH, stream.position_axes, segments_BT, dropout)

    def _drop(self, training: bool | None) -> Callable[[tf.Tensor], tf.Tensor]:
        return functools.partial(self.weight_dropout, training=training)

    def _heads_for_my_queries(self, num_q, k, v) -> tuple[tf.Tensor, tf.Tensor]:
        """Of all key-value heads those that this rank's query heads need, in their order."""
        group = self.num_heads // self.num_kv_heads
        # So many query heads in turn share one, wherever this rank's begin.
        sharing = math.gcd(num_q, group)
        first = current_program().axis_index(AXIS) * num_q
        heads = (first + tf.range(0, num_q, sharing)) // group
        return tf.gather(k, heads, axis=1), tf.gather(v, heads, axis=1)


def _write_cache(cache: tf.Tensor, new: tf.Tensor, offset: int | tf.Tensor) -> tf.Tensor:
    """Puts `new` ``[2, B, K, T, H]`` into the cache at positions offset to offset + T."""
    length = tf.shape(new)[3]
    total = tf.shape(cache)[3]
    padded = tf.pad(new, [[0, 0], [0, 0], [0, 0], [offset, total - offset - length], [0, 0]])
    positions = tf.range(total)
    written = (positions >= offset) & (positions < offset + length)
    updated = tf.where(written[:, tf.newaxis], padded, cache)
    return tf.ensure_shape(updated, cache.shape)
