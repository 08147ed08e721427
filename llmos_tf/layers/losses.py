"""Cross-entropy of tokens, on whole or on vocabulary-parallel logits."""

import math
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.graph.fusion import fused, is_large
from llmos_tf.spmd.program import current_program


class TokenCrossEntropy(keras.losses.Loss):
    """-log softmax(logits)[label] of each token, averaged by token weight.

    The average is the sum of weighted losses over the sum of weights, over all rows, positions and
    ranks. Where an output layer has left its logits cut by vocabulary, the loss is computed on the
    slices with three sums for each token, and no device ever holds the logits of all V tokens
    (Megatron-LM, arXiv 1909.08053, section 3). Where a model has left them cut by rows or positions
    (`layers.activation_sharding`), each rank computes its own part's losses, and only those are
    gathered.

    Args:
        reduction: as for `keras.losses.Loss`.
        name: of the loss.
        dtype: of the computation.

    Call arguments:
        y_true: integers ``[B, T]``.
        y_pred: logits ``[B, T, V]``.
        sample_weight: ``[B, T]``, or None.

    Call returns:
        A scalar, or ``[B, T]`` for reduction None.

    Example:
        >>> model.compile("adamw", loss=TokenCrossEntropy())
    """

    def __init__(
        self,
        reduction: str | None = "mean_with_sample_weight",
        name: str = "token_cross_entropy",
        dtype: Any = None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true: tf.Tensor, y_pred: tf.Tensor) -> tf.Tensor:
        labels = tf.cast(y_true, tf.int32)
        program = current_program()
        stream = None if program is None else program.logits_stream
        if stream is None:
            return _token_losses(labels, y_pred)
        return stream.leave(_token_losses(stream.enter(labels), y_pred))


def sharded_cross_entropy(labels: tf.Tensor, logits: tf.Tensor, axis: str) -> tf.Tensor:
    """Cross-entropy where each rank of `axis` holds the logits of its slice of the vocabulary.

    Args:
        labels: int32 ``[B, T]``, the same on every rank of the axis.
        logits: ``[B, T, V/t]``.
        axis: mesh axis name.

    Returns:
        Losses ``[B, T]``, the same on every rank of the axis.
    """
    width = logits.shape[-1]
    local = labels - collectives.axis_index(axis) * width

    @tf.custom_gradient
    def loss_of(logits):
        peak = collectives.all_reduce(tf.reduce_max(logits, -1), axis, op="max")
        held = (local >= 0) & (local < width)
        picked = tf.gather(logits, tf.where(held, local, 0), batch_dims=2) - peak
        picked = tf.where(held, picked, tf.zeros((), picked.dtype))
        both = tf.stack([_sum_of_exponentials(logits, peak), picked])
        total, label_logit = tf.unstack(collectives.all_reduce(both, axis), 2)
        log_total = tf.math.log(total)

        def gradient(upstream):
            # The logits and a number for each token are all that is kept.
            return _slope(logits, local, peak + log_total, upstream)

        return log_total - label_logit, gradient

    return loss_of(logits)


@fused
def _sum_of_exponentials(logits, peak):
    return tf.reduce_sum(tf.exp(logits - peak[..., tf.newaxis]), -1)


@fused
def _slope(logits, labels, log_total, upstream):
    """(softmax - 1 of the label) times the gradient of the loss; no label where it is not held."""
    weights = tf.exp(logits - log_total[..., tf.newaxis])
    target = tf.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return (weights - target) * upstream[..., tf.newaxis]


@tf.custom_gradient
def _whole_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> Any:
    """-log softmax(logits)[label], and its slope in the same passes over the logits."""
    log_total, slope = _log_total_and_slope(logits, labels)
    # This op refuses labels that there are not, on a CPU.
    losses = log_total - tf.gather(logits, labels, batch_dims=labels.shape.rank)
    return losses, lambda upstream: (None, slope * upstream[..., tf.newaxis])


@fused
def _log_total_and_slope(logits, labels):
    size = logits.shape[-1]
    peak = tf.reduce_max(logits, -1, keepdims=True)
    exponentials = tf.exp(logits - peak)
    total = tf.reduce_sum(exponentials, -1, keepdims=True)
    slope = exponentials * (1.0 / total) - tf.one_hot(labels, size, dtype=logits.dtype)
    # And where there is no such op, they make no loss that could be taken for one.
    known = (labels >= 0) & (labels < size)
    log_total = tf.squeeze(tf.math.log(total) + peak, -1)
    return tf.where(known, log_total, math.nan), slope


def _token_losses(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    program = current_program()
    if program is not None and program.logits_axis is not None:
        return sharded_cross_entropy(labels, logits, program.logits_axis)
    if is_large(logits) and logits.dtype.size >= 4 and logits.shape[-1] is not None:
        return _whole_cross_entropy(labels, logits)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
