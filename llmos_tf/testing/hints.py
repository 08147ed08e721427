"""What a difference from one device most likely comes from."""

from dataclasses import dataclass

import keras
import numpy as np

from llmos_tf.testing.cases import Case
from llmos_tf.testing.report import Mismatch
from llmos_tf.testing.runs import Weights

# A difference of this share of a value is a rounding of float32, and far above one of float64.
_FLOAT32_SHARE = 1e-5
# How far one gradient may be from a multiple of another to be called a multiple.
_PARALLEL = 1e-6

BY_HAND = (
    "All gradients are {ratio} times those of one device, and the batch is split into {ways} parts "
    "({axes}): a loss that is averaged by hand, such as by tf.reduce_mean in a train_step, is a "
    "mean over one part's rows, and the parts' gradients are summed. Use self.compute_loss or a "
    "Keras loss, or divide a sum over rows by the rows of the global batch."
)
SHRUNK = (
    "All gradients are 1/{ways} of those of one device, and the batch is split into {ways} parts "
    "({axes}): gradients are averaged where they have to be summed, or a loss is divided by the "
    "number of replicas once too often."
)
MULTIPLE = (
    "All gradients are {ratio:.6g} times those of one device: a factor is missing or "
    "twice there. Look at what divides the loss, and at how often a gradient is summed."
)
NOT_THE_SAME_MODEL = (
    "The models differ before the first step: the function makes another one at each call. Take "
    "initial values from Keras initializers, or from generators that are seeded in the function."
)
COPIES = (
    "Ranks hold different copies of it ({copies}): a gradient, or a value that a step assigns, is "
    "not reduced over all the ranks that hold it."
)
BATCH_NORM = (
    "{layer} normalizes each replica's rows by themselves, as Keras says of BatchNormalization. "
    "With synchronized=True it normalizes the whole batch, as on one device."
)
STILL_RANDOM = (
    "{layer} draws random numbers, and is no dropout layer that could be switched off; ranks with "
    "other rows draw other ones. Let the function make the model without it."
)
UNEVEN = (
    "Step {step} is the first one whose rows ({rows} over {ways} parts) cannot be split evenly: "
    "most likely means of parts are averaged (a mean of means), where the sum over all rows has to "
    "be divided by their number."
)
ROUNDING = (
    "The difference is of the size of a float32 rounding. Does the model compute in float32 in "
    "between, by a dtype= argument, tf.float32 or a cast? If it has to, verify it in the "
    "dtype float32."
)
OVERFLOW = (
    "Gradients agree. In float16 the whole batch's scaled gradient may overflow, and the step be "
    "skipped, where those of its parts do not. Compile with keras.optimizers.LossScaleOptimizer("
    "optimizer, initial_scale=1024) to compare, or verify in another dtype."
)
FORWARD = (
    "The loss of this step differs too, so the forward pass or the loss is not one device's: look "
    "at what is averaged or summed over rows, and at layers that see only a part of a tensor."
)
BACKWARD = (
    "The loss of this step is one device's, so the forward pass is right: look at the gradients "
    "and at the update."
)
NOT_A_NUMBER = (
    "The values are no numbers on one device either, so there is nothing to compare. Mend the "
    "model, or lower its learning rate."
)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known when a difference is explained.

    Args:
        case: the mesh and its options.
        dtype: policy of the run.
        model: the model on the mesh.
        still_random: a layer that draws although dropout is off, or None.
        uneven: rows of each step that the mesh does not split evenly, by step.
        gradients_agree: whether those of the first batch do.
        ratio: by which the gradients are a multiple of one device's, or None.
        losses: first mismatch of the losses.
    """

    case: Case
    dtype: str
    model: keras.Model
    still_random: str | None
    uneven: dict[int, int]
    gradients_agree: bool
    ratio: float | None
    losses: Mismatch | None


def hint_for(mismatch: Mismatch, evidence: Evidence) -> str:
    """Returns where to look.

    Args:
        mismatch: the first difference.
        evidence: what else is known.

    Returns:
        One or two sentences.
    """
    if not np.isfinite(mismatch.size):
        return NOT_A_NUMBER
    if mismatch.step == 0:
        return NOT_THE_SAME_MODEL
    mesh = evidence.case.mesh
    words = {
        "axes": ", ".join(a for a in ("data", "fsdp") if mesh.axis_size(a) > 1),
        "ways": mesh.batch_ways,
    }
    factor = _factor_hint(evidence.ratio, words)
    if factor is not None:
        return factor
    norms = _unsynchronized(evidence.model) if mesh.batch_ways > 1 else None
    if norms is not None:
        return BATCH_NORM.format(layer=norms)
    if evidence.still_random is not None:
        return STILL_RANDOM.format(layer=evidence.still_random)
    if mismatch.copies is not None:
        return COPIES.format(copies=mismatch.copies)
    if evidence.uneven and min(evidence.uneven) == mismatch.step:
        return UNEVEN.format(step=mismatch.step, rows=evidence.uneven[mismatch.step], **words)
    if evidence.dtype == "float64" and mismatch.difference <= _FLOAT32_SHARE * mismatch.size:
        return ROUNDING
    if evidence.dtype == "mixed_float16" and evidence.gradients_agree:
        return OVERFLOW
    losses = evidence.losses
    return FORWARD if losses is not None and losses.step <= mismatch.step else BACKWARD


def gradient_ratio(one: list[Weights], other: list[Weights], trainable: set[str]) -> float | None:
    """Returns by which factor all gradients are those of one device.

    Args:
        one: weights before and after a step of plain descent on one device.
        other: the same on the mesh.
        trainable: paths of the weights that have gradients.

    Returns:
        The factor; None where the gradients are no multiple, or one device has none.
    """
    along = norm = norm_other = 0.0
    for path in trainable:
        change = _change(one, path)
        change_other = _change(other, path)
        along += float(np.sum(change * change_other))
        norm += float(np.sum(change**2))
        norm_other += float(np.sum(change_other**2))
    if not norm > 0 or not norm_other > 0:
        return None
    # The part of the other gradient that does not lie along the one, relative to it.
    apart = max(0.0, 1 - along**2 / (norm * norm_other))
    return along / norm if apart <= _PARALLEL else None


def _change(weights: list[Weights], path: str) -> np.ndarray:
    return np.asarray(weights[1][path], np.float64) - np.asarray(weights[0][path], np.float64)


def _factor_hint(ratio: float | None, words: dict) -> str | None:
    if ratio is None or abs(ratio - 1) <= 1e-3:
        return None
    if words["ways"] > 1 and abs(ratio / words["ways"] - 1) <= 1e-3:
        return BY_HAND.format(ratio=words["ways"], **words)
    if words["ways"] > 1 and abs(ratio * words["ways"] - 1) <= 1e-3:
        return SHRUNK.format(**words)
    return MULTIPLE.format(ratio=ratio)


def _unsynchronized(model: keras.Model) -> str | None:
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and not layer.synchronized:
            return layer.path or layer.name
    return None
