"""Clipping of summed gradients, by norms that count each rank's part once.

Every rank has a part of a gradient, or all of it; the norms are those of one device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.gradients.sync import update_part


def clip_gradients(
    program: ReplicaProgram,
    optimizer: Any,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Clips summed gradients as the optimizer asks: by norm, by global norm or by value.

    Norms are those of one device: each part counts once, whoever holds it.

    Args:
        program: the program of this rank.
        optimizer: a Keras optimizer with clipnorm, global_clipnorm or clipvalue.
        gradients: summed gradients, as `sync_gradients` returns them.
        variables: their variables.

    Returns:
        Clipped gradients.
    """
    if optimizer.clipnorm and optimizer.clipnorm > 0:
        norms = [tf.sqrt(s) for s in squared_norms(program, gradients, variables)]
        return [_scaled(g, n, optimizer.clipnorm) for g, n in zip(gradients, norms, strict=True)]
    if optimizer.global_clipnorm and optimizer.global_clipnorm > 0:
        norm = tf.sqrt(_squared_global_norm(program, gradients, variables))
        # Dense from here on, as Keras has it.
        parts = [update_part(program, g, v) for g, v in zip(gradients, variables, strict=True)]
        return [_scaled(part, norm, optimizer.global_clipnorm) for part in parts]
    if optimizer.clipvalue and optimizer.clipvalue > 0:
        limit = optimizer.clipvalue
        return [_on_values(g, lambda v: tf.clip_by_value(v, -limit, limit)) for g in gradients]
    return list(gradients)


def _squared_global_norm(
    program: ReplicaProgram, gradients: Sequence[Any], variables: Sequence[ShardedVariable]
) -> tf.Tensor:
    """The squared norm of all gradients together, over all stages."""
    squares = squared_norms(program, gradients, variables)
    dtype = squares[0].dtype if squares else tf.as_dtype(keras.config.floatx())
    # A weight that several stages hold counts at the first.
    once = [
        tf.cast(square, dtype)
        for square, variable in zip(squares, variables, strict=True)
        if (variable.layout.stages or (0,))[0] == program.stage
    ]
    return collectives.all_reduce(tf.add_n([tf.zeros([], dtype), *once]), "pipe")


def squared_norms(
    program: ReplicaProgram,
    gradients: Sequence[tf.Tensor],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Returns the squared norm of each variable's whole gradient.

    Args:
        program: the program of this rank.
        gradients: summed gradients, as `sync_gradients` returns them.
        variables: their variables.

    Returns:
        A scalar for each variable, the same on every rank.
    """
    # Every rank has all rows of a sparse gradient.
    local = [tf.reduce_sum(tf.square(getattr(g, "values", g))) for g in gradients]
    axes_of = [
        () if isinstance(g, tf.IndexedSlices) else program.mesh.canonical_axes(v.update_layout.axes)
        for g, v in zip(gradients, variables, strict=True)
    ]
    result = list(local)
    groups = {(axes, s.dtype) for axes, s in zip(axes_of, local, strict=True) if axes}
    for axes, dtype in sorted(groups, key=str):
        members = [i for i, s in enumerate(local) if axes_of[i] == axes and s.dtype == dtype]
        # One collective for all variables that are cut alike.
        summed = collectives.all_reduce(tf.stack([local[i] for i in members]), axes)
        for i, square in zip(members, tf.unstack(summed, len(members)), strict=True):
            result[i] = square
    return result


def _scaled(gradient: Any, norm: tf.Tensor, limit: float) -> Any:
    norm = tf.cast(norm, gradient.dtype)
    limit = tf.constant(limit, gradient.dtype)
    return _on_values(gradient, lambda v: v * (limit / tf.maximum(norm, limit)))


def _on_values(gradient: Any, function: Callable[[tf.Tensor], tf.Tensor]) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)
