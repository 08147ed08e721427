"""How many tokens an expert takes, and which it takes."""

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.layers.activation_sharding import Stream, current_stream
from llmos_tf.layers.tensor_region import AXIS as TENSOR
from llmos_tf.spmd.program import current_program


def within_capacity(experts_BTK: tf.Tensor, num_experts: int, factor: float) -> tf.Tensor:
    """Takes away the choices that an expert has no room for.

    Of each sequence an expert takes the first ceil(factor · T · K / E) tokens that chose it (a
    sequence is a group in the sense of GShard, arXiv 2006.16668, section 2.2). So what is dropped
    depends on no other row, and on nothing that comes later in the sequence; and it is the same on
    every mesh: where ranks hold positions of the same sequence, their choices are gathered.

    Args:
        experts_BTK: int32, chosen experts of this rank's part of the residual stream.
        num_experts: E.
        factor: room over what each expert gets where they are equally busy.

    Returns:
        int32 ``[B, T, K]``, with E in place of the experts that had no room.
    """
    whole = _all_positions(experts_BTK)
    shape = tf.shape(whole)
    num_choices = shape[1] * shape[2]
    capacity = tf.math.ceil(factor / num_experts * tf.cast(num_choices, tf.float64))
    choices = tf.reshape(whole, [shape[0], num_choices])
    is_of = tf.one_hot(choices, num_experts, dtype=tf.int32)
    earlier = tf.reduce_sum(tf.cumsum(is_of, axis=1, exclusive=True) * is_of, -1)
    kept = tf.where(earlier < tf.cast(capacity, tf.int32), choices, num_experts)
    return tf.ensure_shape(_own_positions(tf.reshape(kept, shape)), experts_BTK.shape)


def _all_positions(x: tf.Tensor) -> tf.Tensor:
    """``[B, T, ...]`` of whole sequences in natural order, from this rank's positions."""
    if _is_sequence_parallel():
        x = collectives.gather_from_axis(x, TENSOR, dim=1)
    return _split_of_positions().leave(x)


def _own_positions(x: tf.Tensor) -> tf.Tensor:
    x = _split_of_positions().enter(x)
    return collectives.split_to_axis(x, TENSOR, dim=1) if _is_sequence_parallel() else x


def _is_sequence_parallel() -> bool:
    program = current_program()
    return program is not None and program.sequence_parallel


def _split_of_positions() -> Stream:
    """How positions alone are split."""
    stream = current_stream() or Stream()
    return Stream((), stream.position_axes, stream.zigzag)
