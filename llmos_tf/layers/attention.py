"""Causal self-attention with heads split over the `tensor` axis."""

import math
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.layers.dense import Dense
from llmos_tf.layers.dropout import Dropout
from llmos_tf.layers.regions import AXIS, TensorRegion, in_stream
from llmos_tf.layers.rotary import rotate
from llmos_tf.program import current_program
from llmos_tf.sharding import layout_of, mark_partial_gradient


class SelfAttention(keras.layers.Layer):
    """softmax(Q Kᵀ / sqrt(H) + causal mask) V, then the output product.

    The query, key and value products are cut by heads (columns) and the output product by heads
    (rows), so a rank attends with its own N/t heads and nothing travels between
    (arXiv 1909.08053). With fewer key-value heads than query heads (grouped-query attention, arXiv
    2305.13245) each serves N/K query heads; where t does not divide K, key and value products are
    whole on every rank, which takes the heads that its query heads need.

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
    ) -> Any:
        region = TensorRegion(self.output_product.kernel)
        q_BTNH, k_BTKH, v_BTKH = self._project(region.enter(x))
        if self.rope_theta is not None:
            positions = tf.range(tf.shape(q_BTNH)[1]) + offset
            q_BTNH = rotate(q_BTNH, positions, self.rope_theta)
            k_BTKH = rotate(k_BTKH, positions, self.rope_theta)
        q = tf.transpose(q_BTNH, [0, 2, 1, 3])
        k = tf.transpose(k_BTKH, [0, 2, 1, 3])
        v = tf.transpose(v_BTKH, [0, 2, 1, 3])
        if cache is not None:
            cache = _write_cache(cache, tf.stack([k, v]), offset)
            k, v = cache[0], cache[1]
        o_BNTH = self._attend(q, k, v, offset, training)
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

    def _attend(self, q_BNTH, k_BKSH, v_BKSH, offset, training) -> tf.Tensor:
        """Attention of N query heads to K key-value heads, for each of which there are N/K."""
        if self._kv_is_whole_but_query_cut():
            k_BKSH, v_BKSH = self._heads_for_my_queries(q_BNTH.shape[1], k_BKSH, v_BKSH)
        num_q, num_kv = q_BNTH.shape[1], k_BKSH.shape[1]
        shape = tf.shape(q_BNTH)
        rows, length, group = shape[0], shape[2], num_q // num_kv
        positions_S = tf.range(tf.shape(k_BKSH)[2])
        visible_TS = positions_S <= tf.range(length)[:, tf.newaxis] + offset
        if group > 1:
            # The query heads of a key-value head lie along its positions: one product for all.
            q_BNTH = tf.reshape(q_BNTH, [rows, num_kv, group * length, self.head_dim])
            visible_TS = tf.tile(visible_TS, [group, 1])
        scale = 1 / math.sqrt(self.head_dim)
        scores = tf.matmul(q_BNTH * tf.constant(scale, q_BNTH.dtype), k_BKSH, transpose_b=True)
        scores = tf.where(visible_TS, scores, scores.dtype.min)
        wide = tf.cast(scores, tf.float32) if scores.dtype.size < 4 else scores
        weights = tf.cast(tf.nn.softmax(wide), scores.dtype)
        weights = self.weight_dropout(weights, training=training)
        o = tf.matmul(weights, v_BKSH)
        return tf.reshape(o, [rows, num_q, length, self.head_dim]) if group > 1 else o

    def _heads_for_my_queries(self, num_q, k, v) -> tuple[tf.Tensor, tf.Tensor]:
        """One key-value head for each query head of this rank, out of all of them."""
        program = current_program()
        first = program.axis_index(AXIS) * num_q
        heads = (first + tf.range(num_q)) // (self.num_heads // self.num_kv_heads)
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
