"""A loss that is computed in the scope and outside of a step is that of one device."""

import functools
from collections.abc import Callable

import tensorflow as tf

from llmos_tf import _internal


@functools.cache
def hook_losses() -> None:
    """Has Keras divide no loss by the number of replicas where no replica computes it, from now on.

    Keras multiplies a loss by 1/replicas in a scope, so that the replicas' losses add up.
    """
    losses = _internal.keras_loss
    for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
        setattr(losses, name, _as_on_one_device(getattr(losses, name)))


def _as_on_one_device(original: Callable) -> Callable:
    @functools.wraps(original)
    def scaled(value):
        is_on_mesh = getattr(tf.distribute.get_strategy().extended, "mesh", None) is not None
        if is_on_mesh and tf.distribute.in_cross_replica_context():
            return value
        return original(value)

    return scaled
