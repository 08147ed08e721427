"""Causal attention on one device: with all scores in one matrix, or by blocks of keys.

By blocks (`layers.online_softmax`) no matrix of scores is kept for the backward pass, only q, k, v,
the result and one number for each query.

Shape suffixes: B rows, N query heads, K key-value heads, T queries, S keys, H head width.
"""

from collections.abc import Callable, Iterable

import tensorflow as tf

from llmos_tf.graph.checkpoint_names import kept, not_kept
from llmos_tf.layers.masks import Mask, WeightDropout
from llmos_tf.layers.online_softmax import (
    MAX_BLOCKS,
    Sums,
    Upstream,
    attend,
    attend_gradient,
    hide,
    mixed,
    products,
)

# Of the queries where all are in order: 5/8 of the scores are computed, and 1/2 are needed.
_PIECES = 4


def plain_attention(
    q_BNTH: tf.Tensor,
    k_BKSH: tf.Tensor,
    v_BKSH: tf.Tensor,
    mask: Mask,
    drop: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """softmax(q kᵀ / sqrt(H)) v with all scores in one matrix, which is kept for backward.

    Args:
        q_BNTH: queries.
        k_BKSH: keys, K a divisor of N.
        v_BKSH: values.
        mask: which keys a query sees, one at least.
        drop: dropout of the weights.

    Returns:
        Tensor like `q_BNTH`.
    """
    weights = _softmax(products(q_BNTH, k_BKSH), mask.visible())
    return mixed(drop(tf.cast(weights, v_BKSH.dtype)), v_BKSH)


def _softmax(scores_BNTS: tf.Tensor, visible: tf.Tensor | None) -> tf.Tensor:
    """softmax of what is seen; backward needs the result only, which is 0 for what is not."""

    @tf.custom_gradient
    def softmax(scores):
        weights = tf.nn.softmax(hide(scores, visible))

        def gradient(upstream):
            inner = tf.reduce_sum(upstream * weights, axis=-1, keepdims=True)
            return weights * (upstream - inner)

        return weights, gradient

    return softmax(scores_BNTS)


def blockwise_attention(
    q_BNTH: tf.Tensor,
    k_BKSH: tf.Tensor,
    v_BKSH: tf.Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    in_order: bool = False,
) -> tf.Tensor:
    """softmax(q kᵀ / sqrt(H)) v by blocks of keys; keeps q, k, v, the result and lse for backward.

    Args:
        q_BNTH: queries.
        k_BKSH: keys, K a divisor of N; S static.
        v_BKSH: values.
        mask: which keys a query sees, one at least.
        dropout: of the weights.
        in_order: whether queries and keys are at the same positions, one after the other. Then
            keys that are later than a whole piece of the queries are not scored.

    Returns:
        Tensor like `q_BNTH`.
    """
    length = q_BNTH.shape[2]
    if not in_order or length % _PIECES:
        return _attention(q_BNTH, k_BKSH, v_BKSH, mask, dropout, k_BKSH.shape[2])
    size = length // _PIECES
    results = []
    for i, q in enumerate(tf.split(q_BNTH, _PIECES, axis=2)):
        seen = (i + 1) * size
        of_piece = mask.of_queries(i * size, size).of_keys(0, seen)
        of_weights = None if dropout is None else dropout.at(i * MAX_BLOCKS)
        results.append(_attention(q, k_BKSH, v_BKSH, of_piece, of_weights, seen))
    return tf.concat(results, axis=2)


def computed_again(values: Iterable[tf.Tensor], upstream: tf.Tensor) -> list[tf.Tensor]:
    """Returns tensors from which the backward pass computes what the forward pass has not kept.

    Args:
        values: what was kept.
        upstream: the cotangent.

    Returns:
        The values, when the cotangent is there: else the graph optimizer would see the same
        products twice, and keep those of the forward pass.
    """
    with tf.control_dependencies([upstream]):
        return [tf.identity(value) for value in values]


def cast_like(values: Iterable[tf.Tensor], others: Iterable[tf.Tensor]) -> list[tf.Tensor]:
    """Returns tensors in the types of others.

    Args:
        values: tensors.
        others: as many.

    Returns:
        The values, cast.
    """
    return [tf.cast(x, y.dtype) for x, y in zip(values, others, strict=True)]


def _attention(q_BNTH, k_BKSH, v_BKSH, mask, dropout, seen) -> tf.Tensor:
    """Attention to the first keys, `seen` of them."""

    @tf.custom_gradient
    def attention(q, k, v):
        with not_kept():
            sums = attend(Sums.of(q), q, k[:, :, :seen], v[:, :, :seen], mask, dropout)
            o, lse = sums.result()
        o, lse = kept(tf.cast(o, q.dtype)), kept(lse)

        def gradient(do):
            again = computed_again((q, k, v), do)
            q_, k_, v_ = again[0], again[1][:, :, :seen], again[2][:, :, :seen]
            dq, dk, dv = attend_gradient(Upstream.of(do, o, lse), q_, k_, v_, mask, dropout)
            unseen = [[0, 0], [0, 0], [0, k.shape[2] - seen], [0, 0]]
            return cast_like((dq, tf.pad(dk, unseen), tf.pad(dv, unseen)), (q, k, v))

        return o, gradient

    return attention(q_BNTH, k_BKSH, v_BKSH)
