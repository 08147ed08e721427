"""Cross-entropy of tokens, on whole or on vocabulary-parallel logits."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.program import current_program


class TokenCrossEntropy(keras.losses.Loss):
    """-log softmax(logits)[label] of each token, averaged by token weight.

    The average is the sum of weighted losses over the sum of weights, over all rows, positions and
    ranks. Where an output layer has left its logits cut by vocabulary, the loss is computed on the
    slices with three sums for each token, and no device ever holds the logits of all V tokens
    (Megatron-LM, arXiv 1909.08053, section 3). Where a model has left them cut by rows or positions
    (`layers.stream`), each rank computes its own part's losses, and only those are gathered.

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
        shifted = logits - peak[..., tf.newaxis]
        exponentials = tf.exp(shifted)
        held = (local >= 0) & (local < width)
        picked = tf.gather(shifted, tf.where(held, local, 0), batch_dims=2)
        picked = tf.where(held, picked, tf.zeros((), picked.dtype))
        both = tf.stack([tf.reduce_sum(exponentials, -1), picked])
        total, label_logit = tf.unstack(collectives.all_reduce(both, axis), 2)

        def gradient(upstream):
            softmax = exponentials / total[..., tf.newaxis]
            target = tf.one_hot(local, width, dtype=logits.dtype)
            return (softmax - target) * upstream[..., tf.newaxis]

        return tf.math.log(total) - label_logit, gradient

    return loss_of(logits)


def _token_losses(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    program = current_program()
    if program is not None and program.logits_axis is not None:
        return sharded_cross_entropy(labels, logits, program.logits_axis)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
