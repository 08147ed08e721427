"""What Keras does differently while a program is traced.

Keras averages a loss over the rows that a replica has, divides by the number of replicas, clips and
checks each replica's gradients, and only then sums them. Every difference from one device comes
from that. Inside a program these few functions of Keras are replaced, and put back after it:

- the divisor of a loss is the global one (`reduce_values`, `apply_mask`), so the sum over ranks of
  local losses is the loss of one device, never a mean of means;
- the loss that is shown is that sum (`unscale_loss_for_distribution`);
- an optimizer's `apply` is `strategies.update.apply_gradients`;
- metrics, when results are read in a step, are summed over ranks.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from keras import ops

from llmos_tf import _internal, collectives
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.program import current_program
from llmos_tf.strategies.update import apply_gradients, apply_scaled_gradients

_loss = _internal.keras_loss


@contextlib.contextmanager
def replica_hooks() -> Iterator[None]:
    """Enters the replacements for the time a program is traced."""
    base, scaled = _internal.BaseOptimizer, _internal.LossScaleOptimizer
    with _internal.patched(
        {
            (_loss, "reduce_values"): lambda original: reduce_values,
            (_loss, "apply_mask"): lambda original: apply_mask,
            (_loss, "unscale_loss_for_distribution"): lambda original: global_loss,
            (base, "apply"): lambda original: apply_gradients,
            (_internal.TFOptimizer, "_all_reduce_sum_gradients"): lambda original: _keep,
            (scaled, "apply"): lambda original: _scaled_apply(original),
            (scaled, "check_finite"): lambda original: check_finite,
            (_internal.Trainer, "get_metrics_result"): _synced_result,
        }
    ):
        yield


def reduce_values(
    values: tf.Tensor,
    sample_weight: tf.Tensor | None = None,
    reduction: str | None = "sum_over_batch_size",
) -> tf.Tensor:
    """Reduces this rank's losses to its share of the global loss.

    Args:
        values: weighted losses of this rank's rows.
        sample_weight: their weights.
        reduction: as in `keras.losses.Loss`.

    Returns:
        A scalar whose sum over the parts of the batch is the loss of one device; `values` as they
        are for reduction None.
    """
    if reduction is None or reduction == "none":
        return values
    if values.shape.rank == 0:
        # A loss function that has averaged by itself: replicas count alike.
        return _loss.scale_loss_for_distribution(values)
    total = ops.sum(values)
    if reduction == "sum":
        return total
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        count = collectives.all_reduce(ops.cast(ops.sum(sample_weight), total.dtype), BATCH_AXES)
    else:
        count = _global_size(values, total.dtype)
    return ops.divide_no_nan(total, count)


def apply_mask(
    sample_weight: tf.Tensor | None, mask: tf.Tensor | None, dtype: Any, reduction: str | None
) -> tf.Tensor | None:
    """Merges a mask into sample weights, such that valid entries are averaged over all ranks.

    Args:
        sample_weight: weights, or None.
        mask: which entries count, or None.
        dtype: of the result.
        reduction: as in `keras.losses.Loss`.

    Returns:
        Weights, or None where there is neither.
    """
    if mask is None:
        return sample_weight
    weight = ops.cast(mask, dtype)
    if reduction in ("mean", "sum_over_batch_size"):
        valid = collectives.all_reduce(ops.sum(weight), BATCH_AXES)
        weight = weight * ops.divide_no_nan(_global_size(mask, dtype), valid)
    if sample_weight is not None:
        sample_weight = ops.cast(sample_weight, dtype)
        weight, sample_weight = _loss.squeeze_or_expand_to_same_rank(weight, sample_weight)
        weight = weight * sample_weight
    return weight


def global_loss(value: tf.Tensor) -> tf.Tensor:
    """Returns the loss of the whole batch from this rank's share.

    Args:
        value: this rank's share of the loss.

    Returns:
        The sum over the parts of the batch, on every rank.
    """
    return collectives.all_reduce(tf.stop_gradient(value), BATCH_AXES)


def check_finite(optimizer: Any, gradients: list) -> tf.Tensor:
    """Returns one verdict for all ranks: whether all summed gradients are finite.

    Args:
        optimizer: the loss-scale optimizer.
        gradients: summed gradients of this rank's parts.

    Returns:
        Boolean scalar.
    """
    del optimizer
    program = current_program()
    values = [getattr(g, "values", g) for g in gradients if g is not None]
    finite = [tf.reduce_all(tf.math.is_finite(value)) for value in values]
    mine = tf.cast(tf.reduce_all(tf.stack(finite)), tf.int32)
    split = [axis for axis, size in program.mesh.sizes.items() if size > 1]
    return tf.equal(collectives.all_reduce(mine, split, op="min"), 1)


def _global_size(values: tf.Tensor, dtype: Any) -> tf.Tensor:
    """Number of elements over all parts of the batch."""
    program = current_program()
    if values.shape.is_fully_defined():
        # One program: static here is static, and the same, on every rank.
        return ops.cast(values.shape.num_elements() * program.mesh.batch_ways, dtype)
    return collectives.all_reduce(ops.cast(tf.size(values), dtype), BATCH_AXES)


def _keep(optimizer: Any, grads_and_vars: Any) -> Any:
    """`_all_reduce_sum_gradients` of gradients that are summed already."""
    del optimizer
    return grads_and_vars


def _scaled_apply(original: Any) -> Any:
    def apply(optimizer, grads, trainable_variables=None):
        apply_scaled_gradients(original, optimizer, grads, trainable_variables)

    return apply


def _synced_result(original: Any) -> Any:
    def get_metrics_result(trainer):
        with _internal.synced_reads():
            return original(trainer)

    return get_metrics_result
