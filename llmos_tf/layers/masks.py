"""What attention leaves out: keys that a query does not see, and weights that are dropped.

Shape suffixes: B rows, T queries, S keys.
"""

from typing import NamedTuple

import tensorflow as tf


class Mask(NamedTuple):
    """Which keys a query sees: of None of the fields all, of both pairs those that both allow.

    Attributes:
        q_positions: int32 ``[T]``; a query sees keys at its own position and before.
        k_positions: int32 ``[S]``.
        q_segments: integers ``[B, T]``; a query sees keys of its own segment.
        k_segments: integers ``[B, S]``.
    """

    q_positions: tf.Tensor | None = None
    k_positions: tf.Tensor | None = None
    q_segments: tf.Tensor | None = None
    k_segments: tf.Tensor | None = None

    def of_keys(self, begin: tf.Tensor, size: int) -> "Mask":
        """Returns the mask for some of the keys.

        Args:
            begin: the first of them.
            size: how many.

        Returns:
            The mask.
        """
        positions, segments = self.k_positions, self.k_segments
        if positions is not None:
            positions = tf.slice(positions, [begin], [size])
        if segments is not None:
            segments = tf.slice(segments, [0, begin], [-1, size])
        return self._replace(k_positions=positions, k_segments=segments)

    def of_queries(self, begin: int, size: int) -> "Mask":
        """Returns the mask for some of the queries.

        Args:
            begin: the first of them.
            size: how many.

        Returns:
            The mask.
        """
        positions, segments = self.q_positions, self.q_segments
        return self._replace(
            q_positions=None if positions is None else positions[begin : begin + size],
            q_segments=None if segments is None else segments[:, begin : begin + size],
        )

    def visible(self) -> tf.Tensor | None:
        """Returns which keys are seen: boolean ``[T, S]`` or ``[B, 1, T, S]``, None for all."""
        seen = None
        if self.q_positions is not None:
            seen = self.k_positions <= self.q_positions[:, tf.newaxis]
        if self.q_segments is not None:
            same = self.k_segments[:, tf.newaxis, tf.newaxis] == self.q_segments[:, None, :, None]
            seen = same if seen is None else same & seen
        return seen


class WeightDropout(NamedTuple):
    """Dropout of attention weights, whose masks can be drawn again.

    Attributes:
        rate: share that is dropped.
        seed: int32 ``[2]``.
    """

    rate: float
    seed: tf.Tensor

    def at(self, block: int | tf.Tensor) -> "WeightDropout":
        """Returns that of a part of the weights.

        Args:
            block: which part.

        Returns:
            Dropout with another seed.
        """
        return self._replace(seed=self.seed + tf.stack([block, 0]))

    def __call__(self, weights: tf.Tensor) -> tf.Tensor:
        return tf.nn.experimental.stateless_dropout(weights, rate=self.rate, seed=self.seed)
