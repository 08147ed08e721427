"""Attention to one block of keys after another, by the online softmax of FlashAttention.

arXiv 2205.14135. The running sums of a query are its largest score m so far, l = Σ exp(s - m) and
Σ exp(s - m) v; a further block of keys scales the old ones down where it has a larger score. When
all were seen the result is o = Σ exp(s - m) v / l, and lse = m + log l is all that is kept of the
scores. By it the backward pass makes the weights P = exp(s - lse) of each block again:

    dv = Pᵀ do,   dP = do vᵀ,   ds = P ∘ (dP - Σ do ∘ o),   dq = ds k,   dk = dsᵀ q

Dropout of the weights multiplies P in dv, and dP, by its mask. Sums are taken in float32 at least.
With K < N key-value heads each is multiplied by its N/K query heads in one product, and keys and
values are not repeated.

Shape suffixes: B rows, N query heads, K key-value heads, T queries, S keys, H head width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from llmos_tf.layers.masks import Mask, WeightDropout

# Keys that are scored at a time. More of them are a loop, of fewer turns than `MAX_BLOCKS`.
BLOCK = 1024
MAX_BLOCKS = 2**16


class Sums(NamedTuple):
    """The running sums of queries: m ``[B, N, T]``, l ``[B, N, T]``, Σ exp(s - m) v like q."""

    peak: tf.Tensor
    total: tf.Tensor
    mixed: tf.Tensor

    @classmethod
    def of(cls, q_BNTH: tf.Tensor) -> "Sums":
        """Returns those of queries that have seen no key.

        Args:
            q_BNTH: the queries.

        Returns:
            The sums.
        """
        mixed = tf.zeros_like(q_BNTH, _wide(q_BNTH.dtype))
        empty = tf.zeros_like(mixed[..., 0])
        # A finite start: were all keys of the first block masked, -inf - -inf would be NaN. What
        # such a block adds is wiped out by the first key that is seen.
        return cls(empty + empty.dtype.min, empty, mixed)

    def result(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns o ``[B, N, T, H]`` and lse ``[B, N, T]``, when all keys were seen."""
        o = self.mixed / self.total[..., tf.newaxis]
        return o, self.peak + tf.math.log(self.total)


def attend(
    sums: Sums,
    q_BNTH: tf.Tensor,
    k_BKSH: tf.Tensor,
    v_BKSH: tf.Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
) -> Sums:
    """Has queries see more keys.

    Args:
        sums: of the queries so far.
        q_BNTH: the queries.
        k_BKSH: the keys.
        v_BKSH: their values.
        mask: which of them a query sees.
        dropout: of the weights.

    Returns:
        The sums with them.
    """

    def add(sums, block):
        k, v, mask, dropout = block
        s_BNTS = scores(q_BNTH, k, mask)
        peak = tf.maximum(sums.peak, tf.reduce_max(s_BNTS, -1))
        weights = tf.exp(s_BNTS - peak[..., tf.newaxis])
        scale = tf.exp(sums.peak - peak)
        total = sums.total * scale + tf.reduce_sum(weights, -1)
        if dropout is not None:
            weights = dropout(weights)
        more = tf.cast(mixed(tf.cast(weights, v.dtype), v), scale.dtype)
        return Sums(peak, total, sums.mixed * scale[..., tf.newaxis] + more)

    count, block_of = _blocks(k_BKSH, v_BKSH, mask, dropout)
    if count == 1:
        return add(sums, block_of(0))
    _, sums = tf.while_loop(
        lambda i, _: i < count,
        lambda i, sums: (i + 1, add(sums, block_of(i))),
        (tf.constant(0), sums),
        parallel_iterations=1,
    )
    return sums


class Upstream(NamedTuple):
    """What the backward pass has of queries: do ``[B, N, T, H]``; lse, Σ do ∘ o ``[B, N, T]``."""

    do: tf.Tensor
    lse: tf.Tensor
    delta: tf.Tensor

    @classmethod
    def of(cls, do: tf.Tensor, o: tf.Tensor, lse: tf.Tensor) -> "Upstream":
        """Returns it from the cotangent and the results.

        Args:
            do: cotangent of o.
            o: result.
            lse: as `Sums.result` returns it.

        Returns:
            The three.
        """
        products = tf.cast(do, lse.dtype) * tf.cast(o, lse.dtype)
        return cls(do, lse, tf.reduce_sum(products, -1))


def attend_gradient(
    upstream: Upstream,
    q_BNTH: tf.Tensor,
    k_BKSH: tf.Tensor,
    v_BKSH: tf.Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The gradients that some keys give.

    Args:
        upstream: of the queries.
        q_BNTH: the queries.
        k_BKSH: the keys.
        v_BKSH: their values.
        mask: as for `attend`.
        dropout: as for `attend`.

    Returns:
        Their part of dq, and dk and dv by these queries; float32 at least.
    """
    wide = upstream.lse.dtype
    scale = 1 / math.sqrt(q_BNTH.shape[-1])

    def gradients(block):
        k, v, mask, dropout = block
        weights = tf.exp(scores(q_BNTH, k, mask) - upstream.lse[..., tf.newaxis])
        dropped = weights if dropout is None else dropout(weights)
        dv = _summed(tf.cast(dropped, v.dtype), upstream.do, v.shape[1])
        d_weights = tf.cast(_products(upstream.do, v), wide)
        if dropout is not None:
            d_weights = dropout(d_weights)
        ds = weights * (d_weights - upstream.delta[..., tf.newaxis]) * scale
        ds = tf.cast(ds, k.dtype)
        return [tf.cast(x, wide) for x in (mixed(ds, k), _summed(ds, q_BNTH, k.shape[1]), dv)]

    count, block_of = _blocks(k_BKSH, v_BKSH, mask, dropout)
    if count == 1:
        return tuple(gradients(block_of(0)))

    def body(i, dq, dk, dv):
        more, dk_i, dv_i = gradients(block_of(i))
        return i + 1, dq + more, dk.write(i, dk_i), dv.write(i, dv_i)

    arrays = [tf.TensorArray(wide, count) for _ in range(2)]
    _, dq, dk, dv = tf.while_loop(
        lambda i, *_: i < count,
        body,
        (tf.constant(0), tf.zeros_like(q_BNTH, wide), *arrays),
        parallel_iterations=1,
    )
    return dq, _laid_out(dk, k_BKSH), _laid_out(dv, v_BKSH)


def scores(q_BNTH: tf.Tensor, k_BKSH: tf.Tensor, mask: Mask) -> tf.Tensor:
    """Returns q kᵀ / sqrt(H), in float32 at least, where a query sees a key.

    Args:
        q_BNTH: the queries.
        k_BKSH: the keys.
        mask: which of them a query sees.

    Returns:
        ``[B, N, T, S]``, the least number there is where a query does not see a key.
    """
    return hide(products(q_BNTH, k_BKSH), mask.visible())


def products(q_BNTH: tf.Tensor, k_BKSH: tf.Tensor) -> tf.Tensor:
    """Returns q kᵀ / sqrt(H), in float32 at least.

    Args:
        q_BNTH: the queries.
        k_BKSH: the keys.

    Returns:
        ``[B, N, T, S]``.
    """
    scale = tf.constant(1 / math.sqrt(q_BNTH.shape[-1]), q_BNTH.dtype)
    scores = _products(q_BNTH * scale, k_BKSH)
    return tf.cast(scores, _wide(scores.dtype))


def hide(scores: tf.Tensor, visible: tf.Tensor | None) -> tf.Tensor:
    """Returns scores, the least number there is where a key is not seen.

    Args:
        scores: ``[B, N, T, S]``.
        visible: as from `Mask.visible`.

    Returns:
        Tensor like `scores`.
    """
    return scores if visible is None else tf.where(visible, scores, scores.dtype.min)


def mixed(weights_BNTS: tf.Tensor, v_BKSH: tf.Tensor) -> tf.Tensor:
    """Returns weighted sums of values, or of keys.

    Args:
        weights_BNTS: the weights.
        v_BKSH: the values.

    Returns:
        ``[B, N, T, H]``.
    """
    grouped = _grouped(weights_BNTS, v_BKSH.shape[1])
    return _ungrouped(tf.matmul(grouped, v_BKSH), weights_BNTS)


def _blocks(
    k: tf.Tensor, v: tf.Tensor, mask: Mask, dropout: WeightDropout | None
) -> tuple[int, Callable]:
    """How many equal blocks of keys there are, and a function that returns the i-th."""
    length = k.shape[2]
    count = _num_blocks(length)
    if count == 1:
        return 1, lambda i: (k, v, mask, dropout)
    size = length // count

    def block(i):
        begin = i * size
        parts = [tf.slice(x, [0, 0, begin, 0], [-1, -1, size, -1]) for x in (k, v)]
        return *parts, mask.of_keys(begin, size), None if dropout is None else dropout.at(i)

    return count, block


def _num_blocks(length: int | None) -> int:
    """Into how many equal blocks of at most `BLOCK` keys a number of keys is cut.

    One where the number is not static, or has no divisor that makes blocks about so large.
    """
    if length is None:
        return 1
    least = -(-length // BLOCK)
    return next((n for n in range(least, 4 * least) if length % n == 0), 1)


def _products(x_BNTH: tf.Tensor, k_BKSH: tf.Tensor) -> tf.Tensor:
    """x kᵀ for the query heads of each key-value head: ``[B, N, T, S]``."""
    grouped = _grouped(x_BNTH, k_BKSH.shape[1])
    return _ungrouped(tf.matmul(grouped, k_BKSH, transpose_b=True), x_BNTH)


def _summed(weights_BNTS: tf.Tensor, x_BNTH: tf.Tensor, num_kv: int) -> tf.Tensor:
    """Weighted sums over the queries of each key-value head: ``[B, K, S, H]``."""
    weights, x = _grouped(weights_BNTS, num_kv), _grouped(x_BNTH, num_kv)
    return tf.matmul(weights, x, transpose_a=True)


def _grouped(x_BNT_: tf.Tensor, num_kv: int) -> tf.Tensor:
    """``[B, N, T, ...]`` as ``[B, K, N/K · T, ...]``: the query heads of each key-value head."""
    _, num_q, length, width = x_BNT_.shape
    if num_q == num_kv:
        return x_BNT_
    sizes = tf.shape(x_BNT_)
    rows = -1 if length is None else num_q // num_kv * length
    return tf.reshape(x_BNT_, [sizes[0], num_kv, rows, sizes[3] if width is None else width])


def _ungrouped(y: tf.Tensor, x_BNT_: tf.Tensor) -> tf.Tensor:
    """The opposite, for a result that has the heads and queries of `x_BNT_`."""
    _, num_q, length, _ = x_BNT_.shape
    if num_q == y.shape[1]:
        return y
    width = y.shape[3]
    sizes = tf.shape(y)
    rows = -1 if length is None else length
    return tf.reshape(y, [sizes[0], num_q, rows, sizes[3] if width is None else width])


def _wide(dtype: tf.DType) -> tf.DType:
    return tf.float32 if dtype.size < 4 else dtype


def _laid_out(blocks: tf.TensorArray, k_BKSH: tf.Tensor) -> tf.Tensor:
    """The gradients of blocks of keys as that of all keys."""
    together = tf.transpose(blocks.stack(), [1, 2, 0, 3, 4])
    return tf.reshape(together, tf.shape(k_BKSH))
