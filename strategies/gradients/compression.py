"""Sums of gradients in fewer bits: bf16, fp16, or int8 with a scale for each block.

The ranks exchange parts in few bits, each adds up its part of all ranks in float32, and the sums
are gathered in few bits. So numbers are rounded twice, however many ranks there are; a ring that
adds in 16 bits would round once for each rank.

What int8 rounds away is kept by the rank that has rounded it, and added to its next gradient
(error feedback, arXiv 1901.09847). Nothing is lost for good: what was applied in all steps and what
is kept add up to the true gradients.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from llmos_tf.collectives.group_ops import Group
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.gradients.packing import packed_rows, unpacked_rows

# Elements that share a scale of int8: a block of 256 sends 260 bytes in place of 1,024.
BLOCK = 256


class BFloat16:
    """Rounds to bfloat16: the range of float32, 8 bits of precision."""

    keeps_error = False
    # A divisor of the number of elements in a row: two fill a float32.
    multiple = 2

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns rows as what travels.

        Args:
            rows: float32 ``[rows, length]``.

        Returns:
            The bits, as float32 ``[rows, fewer]``.
        """
        return _as_bits(tf.cast(rows, tf.bfloat16))

    def decode(self, bits: tf.Tensor) -> tf.Tensor:
        """Returns the rows that `encode` has rounded.

        Args:
            bits: as it returns them.

        Returns:
            float32 ``[rows, length]``.
        """
        return tf.cast(_of_bits(bits, tf.bfloat16), tf.float32)


class Float16:
    """Rounds to float16, 11 bits of precision, after a scaling of each row by a power of two.

    float16 ends at 65,504, and is coarse below 6e-5. So a row is scaled so that its largest element
    is between 2^14 and 2^15, and the scale travels with it: nothing overflows, and what is 2^28
    times smaller than the largest keeps its precision. Gradients that are not finite stay so, for
    the check of a loss scale.
    """

    keeps_error = False
    multiple = 2

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns rows as what travels.

        Args:
            rows: float32 ``[rows, length]``.

        Returns:
            The bits, as float32 ``[rows, fewer]``.
        """
        largest = _largest(rows)
        largest = tf.where(largest < 2.0**-100, 2.0**-100, largest)
        # The bits of its exponent alone are the power of two below it, and inf for NaN.
        exponent = tf.bitwise.bitwise_and(tf.bitcast(largest, tf.int32), 0x7F800000)
        scale = tf.bitcast(exponent, tf.float32) * 2.0**-14
        return tf.concat([_as_bits(tf.cast(rows / scale, tf.float16)), scale], 1)

    def decode(self, bits: tf.Tensor) -> tf.Tensor:
        """Returns the rows that `encode` has rounded.

        Args:
            bits: as it returns them.

        Returns:
            float32 ``[rows, length]``.
        """
        return tf.cast(_of_bits(bits[:, :-1], tf.float16), tf.float32) * bits[:, -1:]


class Int8:
    """Rounds each block of 256 elements to 255 levels between ± its largest.

    The error of an element is at most half a level, largest / 254. A block with an element that is
    not finite gives NaN, for the check of a loss scale.
    """

    keeps_error = True
    multiple = BLOCK

    def encode(self, rows: tf.Tensor) -> tf.Tensor:
        """Returns rows as what travels.

        Args:
            rows: float32 ``[rows, length]``.

        Returns:
            The bits, as float32 ``[rows, fewer]``.
        """
        blocks = tf.reshape(rows, [rows.shape[0], -1, BLOCK])
        largest = _largest(blocks)
        # What is smaller would divide by a number that float32 does not have.
        scale = tf.where(largest < 1e-30, 0.0, largest / 127)
        levels = tf.cast(tf.round(tf.math.divide_no_nan(blocks, scale)), tf.int8)
        return tf.concat([_as_bits(tf.reshape(levels, rows.shape)), scale[..., 0]], 1)

    def decode(self, bits: tf.Tensor) -> tf.Tensor:
        """Returns the rows that `encode` has rounded.

        Args:
            bits: as it returns them.

        Returns:
            float32 ``[rows, length]``.
        """
        # A block is 64 numbers of four levels, and one scale.
        blocks = bits.shape[1] // (BLOCK // 4 + 1)
        levels = _of_bits(bits[:, :-blocks], tf.int8)
        levels = tf.reshape(tf.cast(levels, tf.float32), [bits.shape[0], blocks, BLOCK])
        return tf.reshape(levels * bits[:, -blocks:, tf.newaxis], [bits.shape[0], -1])


CODECS = {"bf16": BFloat16(), "fp16": Float16(), "int8": Int8()}


def compressed_sum(
    program: ReplicaProgram,
    compression: str,
    tensors: Sequence[tf.Tensor],
    axes: tuple[str, ...],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Sums a bucket of gradients over the group.

    Args:
        program: the program of this rank.
        compression: a name in `CODECS`.
        tensors: the gradients of a bucket.
        axes: the axes of the group.
        variables: their variables, the first of which keeps the state.

    Returns:
        The sums, like `tensors`.
    """
    exchange = _exchange(program, compression, tensors, axes, variables, "all_reduce")
    group, codec = exchange.group, exchange.codec
    sent = codec.encode(exchange.mine)
    whole = codec.decode(group.gather(sent, 0, ends=True))
    if exchange.kept is not None:
        # This rank has rounded the sum of its part, and no other rank knows by how much.
        error = exchange.mine - codec.decode(sent)
        keep(exchange.kept, tf.tensor_scatter_nd_add(exchange.error, [[group.index]], error))
    return unpacked_rows(tf.cast(whole, tensors[0].dtype), tensors)


def compressed_scatter(
    program: ReplicaProgram,
    compression: str,
    tensors: Sequence[tf.Tensor],
    axis: str,
    variables: Sequence[ShardedVariable],
) -> tf.Tensor:
    """Reduce-scatters a bucket of gradients (ZeRO); the sums are exact.

    Args:
        program: the program of this rank.
        compression: a name in `CODECS`.
        tensors: the gradients of a bucket.
        axis: the axis of the group.
        variables: their variables, the first of which keeps the state.

    Returns:
        This rank's part of each sum, side by side; the end may be filled with zeros.
    """
    exchange = _exchange(program, compression, tensors, (axis,), variables, "reduce_scatter")
    if exchange.kept is not None:
        keep(exchange.kept, exchange.error)
    return tf.cast(tf.reshape(exchange.mine, [-1]), tensors[0].dtype)


class _Exchange(NamedTuple):
    """The first half of a sum: this rank has the sum of its part, and what it has rounded away."""

    group: Group
    codec: Any
    mine: tf.Tensor
    kept: tf.Variable | None
    error: tf.Tensor | None


def _exchange(program, compression, tensors, axes, variables, kind) -> _Exchange:
    group, codec = Group(axes, f"{compression} {kind}"), CODECS[compression]
    rows = packed_rows([tf.cast(x, tf.float32) for x in tensors], group.size, codec.multiple)
    kept = error = None
    if codec.keeps_error:
        zeros = np.zeros(rows.shape, np.float32)
        kept = rank_state(program, variables, f"{compression} {kind}", zeros)
        rows += kept.value()
    sent = codec.encode(rows)
    if codec.keeps_error:
        error = rows - codec.decode(sent)
    mine = tf.reduce_sum(codec.decode(group.swap(sent, kind)), 0, keepdims=True)
    return _Exchange(group, codec, mine, kept, error)


def rank_state(
    program: ReplicaProgram, variables: Sequence[ShardedVariable], name: str, initial: np.ndarray
) -> tf.Variable:
    """Returns what this rank keeps for the gradients of a bucket, made at its first trace.

    Args:
        program: the program of this rank.
        variables: of the bucket; the first one owns it.
        name: what it is.
        initial: its first value.

    Returns:
        The variable of this rank.
    """
    extended, states = program.strategy.extended, variables[0].reduction_state
    key = (name, initial.shape, *(variable._unique_id for variable in variables))
    if key not in states:
        # Ranks of other stages of a pipeline do not have these weights.
        values = [
            initial if extended.stage_of_position(i) == program.stage else initial[:0]
            for i in range(len(extended.local_ranks))
        ]
        states[key] = extended.make_rank_state(name.replace(" ", "_"), values)
    return states[key].values[program.position]


def keep(kept: tf.Variable, error: tf.Tensor) -> None:
    """Stores what was rounded away.

    Args:
        kept: the variable of this rank.
        error: its new value. Of gradients that were not finite nothing is kept, or no later one
            would be.
    """
    kept.assign(tf.where(tf.math.is_finite(error), error, 0.0))


def _largest(x: tf.Tensor) -> tf.Tensor:
    """The largest magnitude along the last dimension, which stays; NaN where one is not finite."""
    largest = tf.reduce_max(tf.abs(x), -1, keepdims=True)
    finite = tf.reduce_all(tf.math.is_finite(x), -1, keepdims=True)
    return tf.where(finite, largest, float("nan"))


def _as_bits(x: tf.Tensor) -> tf.Tensor:
    """Small numbers side by side in float32, a type that all collectives know; only bits move."""
    per = tf.float32.size // x.dtype.size
    return tf.bitcast(tf.reshape(x, [x.shape[0], -1, per]), tf.float32)


def _of_bits(bits: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tf.reshape(tf.bitcast(bits, dtype), [bits.shape[0], -1])
