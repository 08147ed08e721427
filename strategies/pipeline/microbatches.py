"""A rank's rows, cut into microbatches."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from llmos_tf.spmd.program import ReplicaProgram


def of_any_length(data: Any, count: int) -> Any:
    """Returns rows whose number is forgotten, unless all microbatches have the same known shapes.

    Microbatches may not divide the rows, as those of the last batch of an epoch; and how many
    elements a row of another length has, a loss can tell of one row, not of a batch of known rows.

    Args:
        data: nested tensors whose first dimension is rows.
        count: number of microbatches.

    Returns:
        The same structure.
    """
    tensors = [x for x in tf.nest.flatten(data) if isinstance(x, tf.Tensor) and x.shape.rank]
    if all(x.shape.is_fully_defined() and x.shape[0] % count == 0 for x in tensors):
        return data

    def any_length(x):
        if not isinstance(x, tf.Tensor) or not x.shape.rank or x.shape[0] is None:
            return x
        return tf.compat.v1.placeholder_with_default(x, [None, *x.shape[1:]])

    return tf.nest.map_structure(any_length, data)


class Microbatches:
    """Cuts rows into equal parts, or into parts that differ by one row.

    Microbatch i of n rows in m parts has the rows from i·n/m to (i+1)·n/m. One that has none is
    lent a row of another, as the engine lends a rank one, and has 0 rows of its own.

    Args:
        program: of the stage.
        flat: tensors whose first dimension is rows; scalars go to all microbatches as they are.
        count: m, which divides the rows where their number is known; see `of_any_length`.
    """

    def __init__(self, program: ReplicaProgram, flat: Sequence[tf.Tensor], count: int):
        self.count = count
        self._program = program
        self._rows = next((x for x in flat if x.shape.rank), None)
        # Whether microbatches may differ in rows.
        self.are_uneven = self._rows is not None and self._rows.shape[0] is None
        self._flat = [self._prepared(x) for x in flat]

    def _prepared(self, x: tf.Tensor) -> tf.Tensor:
        if not x.shape.rank or self.are_uneven:
            return x
        rows = x.shape[0] // self.count
        lengths = [length or tf.shape(x)[dim] for dim, length in enumerate(x.shape) if dim]
        return tf.ensure_shape(
            tf.reshape(x, [self.count, rows, *lengths]), [self.count, rows, *x.shape[1:]]
        )

    def at(self, number: int | tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Returns a microbatch.

        Args:
            number: from 0, int32 scalar.

        Returns:
            Its tensors, of at least one row, and its number of own rows, int32 scalar.
        """
        if not self.are_uneven:
            rows = 1 if self._rows is None else self._rows.shape[0] // self.count
            values = [x[number] if x.shape.rank else x for x in self._flat]
            return values, self._counted(tf.constant(rows))
        length = tf.shape(self._rows)[0]
        begin, end = number * length // self.count, (number + 1) * length // self.count
        first = tf.minimum(begin, length - 1)
        last = tf.maximum(end, first + 1)
        values = [x[first:last] if x.shape.rank else x for x in self._flat]
        return values, self._counted(end - begin)

    def without_lent(self, number: int, x: tf.Tensor) -> tf.Tensor:
        """Returns a result of a microbatch, or nothing of it where the microbatch has no row.

        Args:
            number: of the microbatch.
            x: its first dimension counts rows where its length is not static.

        Returns:
            What all microbatches have of it are the results of the rank's rows; a row that is lent
            to the rank is one of them.
        """
        if not self.are_uneven or not x.shape.rank or x.shape[0] is not None:
            return x
        length = tf.shape(self._rows)[0]
        has_rows = (number + 1) * length // self.count > number * length // self.count
        return x[: tf.where(has_rows, tf.shape(x)[0], 0)]

    def num_rows(self) -> tf.Tensor:
        """Returns the number of own rows in all microbatches, int32 scalar."""
        return self._counted(self.length())

    def length(self) -> tf.Tensor:
        """Returns the number of rows in all microbatches, lent to the rank or not, int32 scalar."""
        return tf.constant(self.count) if self._rows is None else tf.shape(self._rows)[0]

    def _counted(self, rows: tf.Tensor) -> tf.Tensor:
        """None of them on a rank whose rows are lent."""
        own = self._program.rows
        return rows if own is None else tf.where(own > 0, rows, 0)
