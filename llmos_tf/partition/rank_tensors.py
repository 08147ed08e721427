"""A rank's tensors: their shapes, and their rows of what all ranks have."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.partition.graph.dims import Dim
from llmos_tf.partition.graph.flat_graph import Value
from llmos_tf.partition.graph.placements import Placement, Sharded

# What collectives add up and compare; other types go as one of these.
REDUCIBLE = (tf.bfloat16, tf.float16, tf.float32, tf.float64, tf.int32, tf.int64)


class RankTensors:
    """Shapes and rows of a rank's tensors.

    Args:
        own_rows: the rank's number of rows, an int or an int32 scalar.
        all_rows: that of the whole batch.
        ways: over how many ranks rows are split.
        index: the rank's place among them, int32 scalar.
    """

    def __init__(self, own_rows: Any, all_rows: Any, ways: int, index: tf.Tensor):
        self.own_rows = own_rows
        self.all_rows = all_rows
        self.ways = ways
        self.index = index
        self.first_row = index * all_rows // ways
        self._constants: dict[Any, tf.Tensor] = {}

    def local_length(self, value: Value, dim: int, length: Callable[[], Any]) -> Any:
        """Returns how long a sharded dimension is on this rank.

        Args:
            value: the value.
            dim: the dimension.
            length: makes the global length, where it depends on more than the rows.

        Returns:
            An int or an int32 scalar.
        """
        return self._of_rows(self.own_rows, value.dims[dim], length)

    def start(self, value: Value, dim: int, length: Callable[[], Any]) -> Any:
        """Returns where the rank's entries begin along a sharded dimension; see `local_length`."""
        return self._of_rows(self.first_row, value.dims[dim], length)

    def _of_rows(self, rows: Any, found: Dim | None, length: Callable[[], Any]) -> Any:
        if found is not None and found.is_fixed and found.row_factor:
            return self._times(rows, found.row_factor)
        return tf.cast(length(), tf.int32) * rows // tf.maximum(self.all_rows, 1)

    def _times(self, rows: Any, factor: int) -> Any:
        if isinstance(rows, int) or factor == 1:
            return rows * factor
        return self._once(("times", rows.ref(), factor), lambda: rows * factor)

    def _once(self, key: Any, make: Callable[[], tf.Tensor]) -> tf.Tensor:
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def global_shape(self, value: Value, dim: int | None, x: tf.Tensor | None) -> tf.Tensor:
        """Returns the global shape of a value.

        Args:
            value: the value.
            dim: the dimension along which it is sharded, or None.
            x: this rank's tensor; may be None where `value.dims` tells all.

        Returns:
            int32 ``[rank]``.
        """
        lengths = []
        for i in range(x.shape.rank if value.dims is None else len(value.dims)):
            known = None if value.dims is None else value.dims[i]
            if known is not None and known.length is not None:
                lengths.append(known.length)
            elif known is not None and known.is_fixed and known.row_factor:
                lengths.append(known.row_factor * self.all_rows)
            elif i == dim:
                lengths.append(self._per_row(x, dim) * self.all_rows)
            else:
                lengths.append(tf.shape(x)[i])
        return tf.stack(lengths) if lengths else tf.zeros([0], tf.int32)

    def _per_row(self, x: tf.Tensor, dim: int) -> tf.Tensor:
        """Entries for each row, which a rank without rows does not know by itself."""
        mine = tf.shape(x)[dim] // tf.maximum(self.own_rows, 1)
        return collectives.all_reduce(mine, BATCH_AXES, op="max")

    def local_shape(self, value: Value, dim: int, shape: tf.Tensor | None) -> tf.Tensor:
        """Returns a global shape as it is on this rank.

        Args:
            value: what has the shape.
            dim: the dimension along which it is sharded.
            shape: the global one; None where `choice.shape_placement` says so.

        Returns:
            int32 ``[rank]``, or of the type of `shape`.
        """
        lengths = [None if known is None else known.length for known in value.dims]
        lengths[dim] = self.local_length(value, dim, lambda: shape[dim])
        if None in lengths:
            return self.with_entry(shape, dim, lengths[dim])
        key = ("shape", *(x if isinstance(x, int) else x.ref() for x in lengths))
        return self._once(key, lambda: tf.stack(lengths))

    def reshaped(self, value: Value, dim: int, shape: tf.Tensor | None) -> tf.Tensor:
        """Returns the shape to which a rank reshapes, where TensorFlow finds the sharded length.

        Args:
            value: the result.
            dim: the dimension along which it is sharded.
            shape: the global shape; None as in `local_shape`.

        Returns:
            int32 ``[rank]``, or of the type of `shape`.
        """
        lengths = [None if known is None else known.length for known in value.dims]
        lengths[dim] = -1
        if None in lengths or 0 in lengths:
            return self.local_shape(value, dim, shape)
        return self._once(("shape", *lengths), lambda: tf.constant(lengths))

    def static_shape(self, value: Value, placement: Placement) -> tf.TensorShape:
        """Returns what is known of the shape of a rank's tensor while the program is made.

        Args:
            value: the value.
            placement: its placement.

        Returns:
            The shape.
        """
        if value.dtype == tf.variant:
            return tf.TensorShape([])
        return tf.TensorShape(None if value.dims is None else self.static_dims(value, placement))

    def static_dims(self, value: Value, placement: Placement) -> list[int | None]:
        """Returns the lengths that are known, of a list those of its elements."""
        lengths = [None if known is None else known.length for known in value.dims]
        if isinstance(placement, Sharded):
            known = value.dims[placement.dim]
            is_static = known is not None and known.is_fixed and isinstance(self.own_rows, int)
            lengths[placement.dim] = self.own_rows * known.row_factor if is_static else None
        return lengths

    def with_entry(self, vector: tf.Tensor, place: int, entry: Any) -> tf.Tensor:
        """Returns a vector with another entry in one place.

        Args:
            vector: of static length.
            place: the place.
            entry: an int or a scalar.

        Returns:
            Tensor like `vector`.
        """
        entry = tf.cast(entry, vector.dtype)[tf.newaxis]
        return tf.concat([vector[:place], entry, vector[place + 1 :]], 0)

    def with_a_row(self, x: tf.Tensor, dim: int = 0) -> tf.Tensor:
        """Returns a tensor with rows along a dimension, and one of zeros where it has none."""
        if x.shape[dim]:
            return x
        lengths = tf.shape(x)
        row = self.with_entry(lengths, dim, 1)
        padded = tf.cond(lengths[dim] > 0, lambda: x, lambda: tf.zeros(row, x.dtype))
        padded.set_shape([None if i == dim else n for i, n in enumerate(x.shape)])
        return padded

    def without_it(self, y: tf.Tensor, x: tf.Tensor, dim: int = 0) -> tf.Tensor:
        """Returns what was made of `with_a_row(x, dim)`, with as many rows as `x` has."""
        return y if x.shape[dim] else y[(*(slice(None),) * dim, slice(tf.shape(x)[dim]))]

    # --- changes of placement --------------------------------------------------------------------

    def as_part(self, x: tf.Tensor) -> tf.Tensor:
        """Returns what every rank has, as the first one's part of a sum."""
        return tf.where(tf.equal(self.index, 0), x, tf.zeros_like(x))

    def own(self, known: Dim | None, dim: int, x: tf.Tensor) -> tf.Tensor:
        """Returns the rank's entries of what every rank has.

        Args:
            known: the global dimension.
            dim: which one of the tensor it is.
            x: the whole.

        Returns:
            The rank's tensor.
        """
        length = self._of_rows(self.own_rows, known, lambda: tf.shape(x)[dim])
        start = self._of_rows(self.first_row, known, lambda: tf.shape(x)[dim])
        at = (slice(None),) * dim
        mine = x[(*at, slice(start, start + length))]
        static = x.shape.as_list()
        static[dim] = length if isinstance(length, int) else None
        mine.set_shape(static)
        return mine

    def gathered(self, known: Dim | None, dim: int, x: tf.Tensor) -> tf.Tensor:
        """Returns all ranks' entries; the arguments are those of `own`."""
        if isinstance(self.own_rows, int):
            return _whole_type(x, lambda x: collectives.all_gather(x, BATCH_AXES, dim))
        is_known = known is not None and known.is_fixed and known.row_factor
        each = known.row_factor if is_known else self._per_row(x, dim)
        longest = -(-self.all_rows // self.ways) * each
        missing = longest - tf.shape(x)[dim]
        numbers = tf.range(self.ways)
        rows = (numbers + 1) * self.all_rows // self.ways - numbers * self.all_rows // self.ways
        mask = tf.reshape(tf.sequence_mask(rows * each, longest), [-1])

        def gather(x):
            paddings = [[0, missing] if i == dim else [0, 0] for i in range(x.shape.rank)]
            padded = collectives.all_gather(tf.pad(x, paddings), BATCH_AXES, dim)
            return tf.boolean_mask(padded, mask, axis=dim)

        whole = _whole_type(x, gather)
        static = x.shape.as_list()
        static[dim] = None
        whole.set_shape(static)
        return whole


def _whole_type(x: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Gathers a tensor of any type."""
    if x.dtype in REDUCIBLE:
        return gather(x)
    if x.dtype.is_complex:
        return tf.complex(gather(tf.math.real(x)), gather(tf.math.imag(x)))
    if x.dtype == tf.string:
        return _whole_text(x, gather)
    as_type = tf.int32 if x.dtype.size <= 4 else tf.int64
    return tf.cast(gather(tf.cast(x, as_type)), x.dtype)


def _whole_text(x: tf.Tensor, gather: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Gathers text as the numbers of its bytes."""
    lengths = tf.strings.length(x)
    longest = tf.reduce_max(tf.concat([tf.reshape(lengths, [-1]), [1]], 0))
    longest = collectives.all_reduce(longest, BATCH_AXES, op="max")
    flat = tf.io.decode_raw(tf.reshape(x, [-1]), tf.uint8, fixed_length=longest)
    codes = tf.reshape(flat, tf.concat([tf.shape(x), [longest]], 0))
    codes.set_shape([*x.shape, None])
    letters = tf.constant([bytes([i]) for i in range(256)])
    padded = tf.strings.reduce_join(tf.gather(letters, gather(tf.cast(codes, tf.int32))), -1)
    wholes = gather(lengths)
    return tf.strings.substr(padded, tf.zeros_like(wholes), wholes)
