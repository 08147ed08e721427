"""The train-step library: see `llmos_tf.training.step` for the two algorithms."""

from llmos_tf.training.gradient_descent import GradientDescent
from llmos_tf.training.step import (
    batch_loss,
    local_gradients,
    make_loss_step,
    make_train_step,
    split_batch,
    train_step,
)

__all__ = [
    "GradientDescent",
    "batch_loss",
    "local_gradients",
    "make_loss_step",
    "make_train_step",
    "split_batch",
    "train_step",
]
