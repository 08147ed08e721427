"""The rows of a batch: which parts of a batch have rows, and how they are split over replicas.

A dense, ragged or sparse tensor of one dimension or more has rows. A scalar, None and an empty
`tf.experimental.Optional`, by which Keras writes None in a dataset, have none, and every replica
gets them whole.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from llmos_tf.mesh import Mesh

_WITH_ROWS = (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)


def split_rows(batch: Any, ways: int, parts: Sequence[int]) -> tuple:
    """Splits a batch by rows.

    A batch of n rows over R replicas gives replica i the rows from i·n/R to (i+1)·n/R, so that an
    uneven or small last batch is split too, and every row is used once.

    Args:
        batch: nested tensors.
        ways: number R of parts.
        parts: those that are wanted.

    Returns:
        One structure like `batch` for each of `parts`.

    Raises:
        ValueError: tensors of the batch differ in their number of rows.
    """  # noqa: DOC502
    if ways > 1:
        _check_rows(batch, ways)
    return tuple(tf.nest.map_structure(lambda x, i=i: _rows(x, i, ways), batch) for i in parts)


def no_rows(spec: Any) -> Any:
    """Returns a batch of no rows.

    Args:
        spec: of a dense, ragged or sparse tensor with rows, or of what has none.

    Returns:
        A value of that spec; None where what has no rows cannot be left out.
    """
    if isinstance(spec, tf.RaggedTensorSpec) and spec.ragged_rank:
        flat = tf.zeros([0, *(n or 0 for n in spec.shape[spec.ragged_rank + 1 :])], spec.dtype)
        splits = [tf.zeros([1], spec.row_splits_dtype)] * spec.ragged_rank
        return tf.RaggedTensor.from_nested_row_splits(flat, splits)
    shape = getattr(spec, "shape", None)
    if isinstance(spec, tf.RaggedTensorSpec) or shape is None or not shape.rank:
        return None
    shape = [0, *(length or 0 for length in shape[1:])]
    if isinstance(spec, tf.SparseTensorSpec):
        return tf.sparse.from_dense(tf.zeros(shape, spec.dtype))
    return tf.zeros(shape, spec.dtype)


def lend_rows(mesh: Mesh, num_parts: int, ranks: list[Any]) -> tuple[list[tf.Tensor] | None, list]:
    """Lends ranks without a row one of the last rank's; see `llmos_tf.collectives.batch`.

    Args:
        mesh: the mesh.
        num_parts: number of parts of the batch that this process works on.
        ranks: the arguments of each rank, nested.

    Returns:
        For each rank the number of rows of its own, or None where each has as many; and arguments
        of at least one row.
    """
    if mesh.size == 1:
        return None, ranks
    by_rank = [tf.nest.flatten(arguments) for arguments in ranks]
    leaves = list(zip(*by_rank, strict=True))
    split = {i for i, values in enumerate(leaves) if _is_split(values, num_parts)}
    if not split:
        return None, ranks
    rows = [num_rows(value) for value in leaves[min(split)]]
    lent = [_lent(values) if i in split else values for i, values in enumerate(leaves)]
    packed = [
        tf.nest.pack_sequence_as(arguments, values)
        for arguments, values in zip(ranks, zip(*lent, strict=True), strict=True)
    ]
    return rows, packed


def _is_split(values: tuple, num_parts: int) -> bool:
    """Whether an input is rows of the batch, as far as this process sees, whose number may be 0."""
    if not all(isinstance(x, _WITH_ROWS) and x.shape.rank for x in values):
        return False
    lengths = {x.shape[0] for x in values}
    may_be_empty = len(lengths) > 1 or None in lengths or 0 in lengths
    return may_be_empty and (num_parts == 1 or values[0] is not values[-1])


def _lent(values: tuple) -> list:
    """An input of each rank, with the last one's first row for those that have none."""
    last = values[-1]
    with tf.device("CPU:0"):
        # Zeros where this process has no row at all.
        row = tf.cond(num_rows(last) > 0, lambda: _range(last, 0, 1), lambda: _one_row(last))
        return [_or_lent(x, row) for x in values]


def _or_lent(x: Any, row: Any) -> Any:
    if x.shape[0] is not None:
        return x if x.shape[0] else row
    return tf.cond(num_rows(x) > 0, lambda: x, lambda: row)


def _one_row(x: Any) -> Any:
    """A row of zeros like those of `x`; of a ragged tensor an empty one."""
    if isinstance(x, tf.RaggedTensor):
        return tf.RaggedTensor.from_row_lengths(x[:0].values, tf.zeros([1], x.row_splits.dtype))
    if isinstance(x, tf.SparseTensor):
        return tf.sparse.reset_shape(x, tf.concat([[1], x.dense_shape[1:]], 0))
    return tf.zeros(tf.concat([[1], tf.shape(x)[1:]], 0), x.dtype)


def num_rows(x: Any) -> tf.Tensor:
    """Returns the number of rows of a tensor that has rows, int32 scalar.

    Args:
        x: dense, ragged or sparse.

    Returns:
        The number.
    """
    if isinstance(x, tf.RaggedTensor):
        return tf.cast(x.nrows(), tf.int32)
    if isinstance(x, tf.SparseTensor):
        return tf.cast(x.dense_shape[0], tf.int32)
    return tf.shape(x)[0]


def _range(x: Any, begin: Any, end: Any) -> Any:
    """The rows from `begin` to before `end`."""
    if not isinstance(x, tf.SparseTensor):
        return x[begin:end]
    begin, end = tf.cast(begin, tf.int64), tf.cast(end, tf.int64)
    start = tf.concat([[begin], tf.zeros_like(x.dense_shape[1:])], 0)
    rows = tf.sparse.slice(x, start, tf.concat([[end - begin], x.dense_shape[1:]], 0))
    rows.set_shape([None, *x.shape[1:]])
    return rows


def _rows(x: Any, index: int, ways: int) -> Any:
    if ways == 1 or not _has_rows(x):
        return x
    static = x.shape[0] if x.shape.rank is not None else None
    if static is not None and static % ways == 0:
        return _range(x, index * static // ways, (index + 1) * static // ways)
    rows = num_rows(x)
    if static is not None and tf.is_symbolic_tensor(rows):
        # Other parts of the batch, of which another process knows, have other lengths: so that all
        # trace the same program, none knows the length of its own.
        rows = tf.compat.v1.placeholder_with_default(rows, [])
    return _range(x, index * rows // ways, (index + 1) * rows // ways)


def _has_rows(x: Any) -> bool:
    return isinstance(x, _WITH_ROWS) and x.shape.rank != 0


def _check_rows(batch: Any, ways: int) -> None:
    """Refuses tensors of other numbers of rows: they would be cut as if they were rows."""
    leaves = [x for x in tf.nest.flatten(batch) if _has_rows(x)]
    lengths = {x.shape[0] if x.shape.rank is not None else None for x in leaves}
    if len(lengths - {None}) > 1:
        raise ValueError(_unequal(leaves, ways))
    if len(leaves) > 1 and None in lengths:
        counts = tf.stack([num_rows(x) for x in leaves])
        are_equal = tf.reduce_all(tf.equal(counts, counts[0]))
        tf.debugging.Assert(are_equal, [_unequal(leaves, ways), "Rows:", counts], summarize=-1)


def _unequal(leaves: list, ways: int) -> str:
    shapes = ", ".join(str(tuple(x.shape)) if x.shape.rank is not None else "?" for x in leaves)
    return (
        f"A batch is split by rows over {ways} replicas, so all its tensors need the same number "
        "of rows in their first dimension. A scalar goes to every replica as it is; let the model "
        "hold anything else that is not rows, as a weight or a constant. "
        f"Received: tensors of shapes {shapes}."
    )
