"""Attention where each rank has some of the positions: ring attention, and Ulysses.

Ring attention (arXiv 2310.01889): keys and values travel around the ranks, each of which has its
queries see those that pass by (`online_softmax.attend`) and keeps only its own. In the
backward pass they travel again, with their gradients, which come home after a whole turn.

With zigzag placement (`layers.activation_sharding`) a rank's positions are two pieces, one early
(lo) and one late (hi), and whatever keys come, exactly two products of pieces are to be computed,
without a mask. For keys of rank j at rank i:

    j < i:  q_lo with k_lo, q_hi with k_lo        j > i:  q_hi with k_lo, q_hi with k_hi

There is one program for all ranks, so which pieces they are is selected by the rank's index.

Ulysses (arXiv 2309.14509): an all-to-all gives each rank all positions of some heads, and another
one brings the results back.

Shape suffixes: B rows, N query heads, K key-value heads, L positions of this rank, T all positions,
H head width.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.graph.checkpoint_names import kept, not_kept
from llmos_tf.layers.blockwise_attention import blockwise_attention, cast_like, computed_again
from llmos_tf.layers.masks import Mask, WeightDropout
from llmos_tf.layers.online_softmax import MAX_BLOCKS, Sums, Upstream, attend, attend_gradient

Axes = tuple[str, ...]


def ring_attention(
    q_BNLH: tf.Tensor,
    k_BKLH: tf.Tensor,
    v_BKLH: tf.Tensor,
    axes: Axes,
    segments_BL: tf.Tensor | None = None,
    dropout: WeightDropout | None = None,
) -> tf.Tensor:
    """Causal attention to the keys of all ranks, positions placed in zigzag.

    Forward sends k and v (and the segments) on to the next rank, size of the group - 1 times.
    Backward does so again, and sends their gradients on as many times and once more.

    Args:
        q_BNLH: this rank's queries.
        k_BKLH: this rank's keys, K a divisor of N.
        v_BKLH: their values.
        axes: mesh axes over which positions are split.
        segments_BL: integers, the document of each position, or None.
        dropout: of the weights, with another seed on each rank.

    Returns:
        Tensor like `q_BNLH`.
    """

    @tf.custom_gradient
    def attention(q, k, v):
        ring = _Ring(axes, segments_BL, dropout)
        with not_kept():
            o, lse = ring.forward(q, k, v)
        o, lse = kept(tf.cast(o, q.dtype)), kept(lse)

        def gradient(do):
            upstream = Upstream.of(do, o, lse)
            gradients = ring.backward(upstream, *computed_again((q, k, v), do))
            return cast_like(gradients, (q, k, v))

        return o, gradient

    return attention(q_BNLH, k_BKLH, v_BKLH)


def ulysses_attention(
    q_BNLH: tf.Tensor,
    k_BKLH: tf.Tensor,
    v_BKLH: tf.Tensor,
    axes: Axes,
    segments_BL: tf.Tensor | None = None,
    dropout: WeightDropout | None = None,
) -> tf.Tensor:
    """Causal attention to the keys of all ranks, positions placed contiguously.

    Each rank attends with N/p of the heads. Fewer key-value heads than ranks are repeated as far as
    each rank gets one.

    Args:
        q_BNLH: this rank's queries.
        k_BKLH: this rank's keys, K a divisor of N.
        v_BKLH: their values.
        axes: mesh axes over which positions are split; p is their size.
        segments_BL: integers, the document of each position, or None.
        dropout: of the weights, with another seed on each rank.

    Returns:
        Tensor like `q_BNLH`.

    Raises:
        ValueError: p does not divide the query heads.
    """  # noqa: DOC502
    ways, num_q, num_kv = collectives.axis_size(axes), q_BNLH.shape[1], k_BKLH.shape[1]
    check_heads(num_q, ways)
    kv = tf.stack([k_BKLH, v_BKLH])
    kv = tf.repeat(kv, ways // math.gcd(num_kv, ways), axis=2)
    q = collectives.all_to_all(q_BNLH, axes, split_dim=1, concat_dim=2)
    k, v = tf.unstack(collectives.all_to_all(kv, axes, split_dim=2, concat_dim=3))
    positions = tf.range(q.shape[2])
    segments = None
    if segments_BL is not None:
        segments = collectives.all_gather(segments_BL, axes, dim=1)
    mask = Mask(positions, positions, segments, segments)
    o = blockwise_attention(q, k, v, mask, dropout, in_order=True)
    return collectives.all_to_all(o, axes, split_dim=2, concat_dim=1)


def check_heads(num_heads: int, ways: int) -> None:
    """Checks that `ulysses_attention` can deal out the heads.

    Args:
        num_heads: query heads of a rank.
        ways: number of ranks over which positions are split.

    Raises:
        ValueError: it cannot.
    """
    if num_heads % ways:
        raise ValueError(
            f"context_method='ulysses' deals a rank's {num_heads} query heads to {ways} ranks, "
            "which do not divide them. Use context_method='ring', or a context axis that divides "
            "the heads."
        )


class _Pair(NamedTuple):
    """What belongs to the early and to the late piece of a rank's positions.

    Which piece is said by a boolean, True for the early one: Python's, or a tensor where it depends
    on the rank.
    """

    lo: Any
    hi: Any

    @classmethod
    def of(cls, x: tf.Tensor | None, dim: int) -> "_Pair":
        return cls(None, None) if x is None else cls(*tf.split(x, 2, axis=dim))

    def joined(self) -> tf.Tensor:
        return tf.concat(self, axis=2)

    def piece(self, is_lo: Any) -> Any:
        return _where(is_lo, self.lo, self.hi)

    def with_piece(self, is_lo: Any, new: Any) -> "_Pair":
        return _Pair(_where(is_lo, new, self.lo), _where(is_lo, self.hi, new))

    def plus(self, is_lo: Any, more: tf.Tensor) -> "_Pair":
        return self.with_piece(is_lo, self.piece(is_lo) + more)


class _Product(NamedTuple):
    """A product of two pieces: of queries and of keys, and whether they are the same positions."""

    q_is_lo: Any
    k_is_lo: Any
    is_diagonal: bool


class _Ring:
    """The way of keys and values around the ranks, forward and backward."""

    def __init__(self, axes: Axes, segments_BL: tf.Tensor | None, dropout: WeightDropout | None):
        self._axes = axes
        self._segments = segments_BL
        self._dropout = dropout
        self._size = collectives.axis_size(axes)
        self._index = collectives.axis_index(axes)

    def forward(self, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """o and lse of this rank's queries."""
        queries = _Pair.of(q, dim=2)
        sums = _Pair(Sums.of(queries.lo), Sums.of(queries.hi))
        travelling = (tf.stack([k, v]), self._segments)
        for step in range(self._size):
            here, travelling = travelling, self._sent_on(travelling, step, sums)
            for product, (k_piece, v_piece), mask, dropout in self._products(step, *here):
                mine = queries.piece(product.q_is_lo)
                before = sums.piece(product.q_is_lo)
                after = attend(before, mine, k_piece, v_piece, mask, dropout)
                sums = sums.with_piece(product.q_is_lo, after)
        lo, hi = sums.lo.result(), sums.hi.result()
        return tuple(tf.concat(both, axis=2) for both in zip(lo, hi, strict=True))

    def backward(
        self, upstream: Upstream, q: tf.Tensor, k: tf.Tensor, v: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """dq, dk and dv of this rank's positions."""
        queries = _Pair.of(q, dim=2)
        upstreams = _Pair(
            *itertools.starmap(Upstream, zip(*(tf.split(x, 2, 2) for x in upstream), strict=True))
        )
        travelling = (tf.stack([k, v]), self._segments)
        # Those of all layers would be there from the beginning of a step.
        with tf.control_dependencies([upstream.do]):
            dq = _Pair(*(tf.zeros_like(x, upstream.lse.dtype) for x in queries))
            d_travelling = tf.zeros_like(travelling[0], upstream.lse.dtype)
        for step in range(self._size):
            here, travelling = travelling, self._sent_on(travelling, step, dq)
            dkv = _Pair.of(d_travelling, dim=3)
            for product, (k_piece, v_piece), mask, dropout in self._products(step, *here):
                dq_piece, *dkv_piece = attend_gradient(
                    upstreams.piece(product.q_is_lo),
                    queries.piece(product.q_is_lo),
                    k_piece,
                    v_piece,
                    mask,
                    dropout,
                )
                dq = dq.plus(product.q_is_lo, dq_piece)
                dkv = dkv.plus(product.k_is_lo, tf.stack(dkv_piece))
            # With their keys; and after the last ones, which were the next rank's, home.
            d_travelling = collectives.permute(tf.concat(dkv, axis=3), self._axes)
        return dq.joined(), *tf.unstack(d_travelling)

    def _sent_on(self, travelling: tuple, step: int, previous: Any) -> tuple | None:
        """What the rank before has here, while this step computes; None in the last step."""
        if step == self._size - 1:
            return None
        # Not before the step before this one is done, or all ranks' keys would come at once.
        with tf.control_dependencies(tf.nest.flatten(previous)):
            return tuple(
                None if x is None else collectives.permute(tf.identity(x), self._axes)
                for x in travelling
            )

    def _products(
        self, step: int, kv: tf.Tensor, k_segments: tf.Tensor | None
    ) -> Iterator[tuple[_Product, list[tf.Tensor], Mask, WeightDropout | None]]:
        """The products of a step, each with its keys and values, mask and dropout."""
        if step == 0:
            products = [(True, True, True), (False, True, False), (False, False, True)]
        else:
            # The keys are of rank index - step, around the ring.
            is_earlier = self._index >= step
            products = [(is_earlier, True, False), (False, is_earlier, False)]
        pieces, k_segments = _Pair.of(kv, dim=3), _Pair.of(k_segments, dim=1)
        q_segments = _Pair.of(self._segments, dim=1)
        positions = tf.range(kv.shape[3] // 2)
        for number, product in enumerate(itertools.starmap(_Product, products)):
            order = (positions, positions) if product.is_diagonal else (None, None)
            mask = Mask(
                *order, q_segments.piece(product.q_is_lo), k_segments.piece(product.k_is_lo)
            )
            part = (3 * step + number) * MAX_BLOCKS
            dropout = None if self._dropout is None else self._dropout.at(part)
            yield product, tf.unstack(pieces.piece(product.k_is_lo)), mask, dropout


def _where(condition: Any, one: Any, other: Any) -> Any:
    """One of two structures of tensors."""
    if isinstance(condition, bool):
        return one if condition else other
    return tf.nest.map_structure(
        lambda x, y: None if x is None else tf.where(condition, x, y), one, other
    )
