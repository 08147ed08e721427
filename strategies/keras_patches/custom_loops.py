"""Custom loops whose optimizer is called outside of `strategy.run`."""

import functools
import warnings
from typing import Any

from llmos_tf import _internal
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import HOW_TO_TRAIN, current_program


@functools.cache
def hook_optimizers() -> None:
    """Patches Keras's optimizers to tell users of a `tf.GradientTape` how to train on a mesh."""
    original = _internal.BaseOptimizer.apply

    @functools.wraps(original)
    def apply(optimizer: Any, grads: Any, trainable_variables: Any = None) -> None:
        if current_program() is None:
            variables = trainable_variables or optimizer._trainable_variables
            stored = [getattr(variable, "_value", variable) for variable in variables]
            _check_outside(optimizer, [v for v in stored if isinstance(v, ShardedVariable)])
        original(optimizer, grads, trainable_variables)

    _internal.BaseOptimizer.apply = apply


def _check_outside(optimizer: Any, variables: list[ShardedVariable]) -> None:
    if not variables:
        return
    mesh = variables[0].mesh
    is_whole = all(v.update_layout.is_whole and not v.waits for v in variables)
    if not is_whole:
        raise ValueError(
            f"The optimizer {optimizer.name!r} was called outside of strategy.run, where no rank "
            f"of the mesh {mesh} computes. {HOW_TO_TRAIN}"
        )
    if mesh.size > 1:
        warnings.warn(
            f"The optimizer {optimizer.name!r} was called outside of strategy.run, so one device "
            f"computes the whole batch and the others of the mesh {mesh} wait. {HOW_TO_TRAIN}",
            stacklevel=3,
        )
