"""Sums of gradients as matrices of low rank: PowerSGD (arXiv 1905.13727).

For a gradient M_i [n, m] of rank i of the mesh, with what was left out before added to it, and Q
[m, r] of the step before:

    P = Σ_i M_i Q            summed over the group, then made orthonormal
    Q = Σ_i M_iᵀ P           summed over the group
    Σ_i M_i ≈ P Qᵀ           what is applied
    M_i - P (M_iᵀ P)ᵀ        what rank i keeps for the next step

so r (n + m) numbers travel in place of n m. It is one turn of a power iteration, which goes on from
step to step: gradients change slowly, and Q is already near their largest singular vectors.
"""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.sharding import ShardedVariable
from llmos_tf.spmd.program import ReplicaProgram
from llmos_tf.strategies.gradients.compression import keep, rank_state
from llmos_tf.strategies.gradients.packing import packed, unpacked

# What saves less is not worth what it loses; biases and norms save nothing (PyTorch's bound).
MIN_SAVING = 2


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns a tensor's shape as a matrix, cut where the two sides add up to the least.

    Args:
        shape: of the tensor.

    Returns:
        (n, m), whose product is the number of elements.

    Example:
        >>> matrix_shape((64, 4, 16))
        (64, 64)
    """
    sides = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(len(shape) + 1)]
    return min(sides, key=sum)


def is_compressible(shape: Sequence[int], rank: int) -> bool:
    """Returns whether a matrix of low rank is at most half as large as a gradient.

    Args:
        shape: of the gradient.
        rank: r.

    Returns:
        False for vectors, and for matrices too small.
    """
    n, m = matrix_shape(shape)
    return MIN_SAVING * rank * (n + m) <= n * m


def low_rank_sum(
    program: ReplicaProgram,
    tensors: Sequence[tf.Tensor],
    axes: tuple[str, ...],
    variables: Sequence[ShardedVariable],
) -> list[tf.Tensor]:
    """Sums a bucket of gradients over the group, nearly.

    Args:
        program: the program of this rank.
        tensors: gradients that are compressible.
        axes: the axes of the group.
        variables: their variables, the first of which keeps the state.

    Returns:
        Sums of low rank, like `tensors`.
    """
    rank = program.strategy.extended.options.powersgd_rank
    shapes = [matrix_shape(tensor.shape) for tensor in tensors]
    matrices = [tf.reshape(tf.cast(x, tf.float32), s) for x, s in zip(tensors, shapes, strict=True)]
    zeros = np.zeros([sum(math.prod(shape) for shape in shapes)], np.float32)
    errors = rank_state(program, variables, "powersgd error", zeros)
    matrices = unpacked(packed(matrices) + errors.value(), matrices)
    # The same on every rank.
    start = np.random.default_rng(0).normal(size=sum(m * rank for _, m in shapes))
    warm = rank_state(program, variables, "powersgd q", start.astype(np.float32))
    q = _cut(warm.value(), [(m, rank) for _, m in shapes])
    p = _summed([matrix @ each for matrix, each in zip(matrices, q, strict=True)], axes)
    p = [tf.linalg.qr(each).q for each in p]
    own = [tf.matmul(m, each, transpose_a=True) for m, each in zip(matrices, p, strict=True)]
    q = _summed(own, axes)
    left = [m - _product(*sides) for m, *sides in zip(matrices, p, own, strict=True)]
    keep(errors, packed(left))
    following = packed(q)
    # Of gradients that are not finite no later one would recover.
    finite = tf.reduce_all(tf.math.is_finite(following))
    warm.assign(tf.where(finite, following, warm.value()))
    sums = [_product(*sides) for sides in zip(p, q, strict=True)]
    return [
        tf.cast(tf.reshape(total, x.shape), x.dtype) for total, x in zip(sums, tensors, strict=True)
    ]


def _product(p: tf.Tensor, q: tf.Tensor) -> tf.Tensor:
    return tf.matmul(p, q, transpose_b=True)


def _summed(tensors: Sequence[tf.Tensor], axes: tuple[str, ...]) -> list[tf.Tensor]:
    return unpacked(collectives.all_reduce(packed(tensors), axes, hierarchical=True), tensors)


def _cut(flat: tf.Tensor, shapes: Sequence[tuple[int, int]]) -> list[tf.Tensor]:
    parts = tf.split(flat, [math.prod(shape) for shape in shapes])
    return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
