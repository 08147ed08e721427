"""Loss of a model over held-out text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import keras

from llmos_tf.data import BatchIterator, PackedTokens
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.training.step import make_loss_step


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Result of an evaluation.

    Attributes:
        loss: nats per predicted token.
        bits_per_byte: total loss in bits, over the bytes of the text.
        num_tokens: tokens predicted.
        num_bytes: bytes of the text.
    """

    loss: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


def evaluate(
    model: keras.Model,
    heldout: PackedTokens,
    num_bytes: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOutLoss:
    """Computes the loss of every token of a text, once.

    Args:
        model: a language model.
        heldout: the packed text.
        num_bytes: its UTF-8 bytes.
        batch_size: sequences in a step, over all devices.
        progress: called after each step with (steps done, steps in all).

    Returns:
        The loss, also in bits per byte: sum of -log2 p(token) / bytes.
    """
    step = make_loss_step(model, TokenCrossEntropy())
    batches = BatchIterator(heldout, batch_size=batch_size, seed=0, shuffle=False, repeat=False)
    steps = math.ceil(heldout.num_sequences / batch_size)
    total, count = 0.0, 0.0
    for done, (x, y, weights) in enumerate(batches, start=1):
        weight = float(weights.sum())
        total += float(step(x, y, weights)) * weight
        count += weight
        if progress is not None:
            progress(done, steps)
    return HeldOutLoss(
        loss=total / count,
        bits_per_byte=total / math.log(2) / num_bytes,
        num_tokens=int(count),
        num_bytes=num_bytes,
    )
