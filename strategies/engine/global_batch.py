"""The arguments of a partitioned step: each rank's rows, and the specs of the whole batch."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from llmos_tf.strategies.engine.rows import num_rows

_COMPOSITES = (tf.RaggedTensor, tf.SparseTensor)


class GlobalBatch:
    """What a step is given, as one device would be.

    Dense tensors with rows are given to each rank as its rows. Ragged and sparse ones, whose parts
    are no rows of the tensors that they consist of, are put together for all ranks.

    Args:
        ranks: (arguments, keyword arguments) of each local rank.
        parts: positions of one rank for each part of the batch of this process.
        ways: number of parts of the batch, of all processes.
    """

    def __init__(self, ranks: Sequence[Any], parts: Sequence[int], ways: int):
        self._structure = ranks[0]
        columns = list(zip(*(tf.nest.flatten(arguments) for arguments in ranks), strict=True))
        self._is_whole = [isinstance(values[0], _COMPOSITES) for values in columns]
        wholes = [
            _joined([values[i] for i in parts]) if is_whole else None
            for values, is_whole in zip(columns, self._is_whole, strict=True)
        ]
        self._leaves = [
            values[0] if whole is None else whole
            for values, whole in zip(columns, wholes, strict=True)
        ]
        self.specs: list[tf.TensorSpec] = []
        self.has_rows: list[bool] = []
        self.rank_specs: list[tf.TensorSpec] = []
        self.tensors: list[list[tf.Tensor]] = [[] for _ in ranks]
        # How many rows each rank has, int32 scalars.
        self.num_rows = _numbers_of_rows(columns, len(ranks))
        lengths: set[int | None] = set()
        for values, whole in zip(columns, wholes, strict=True):
            if whole is not None:
                for x in tf.nest.flatten(whole, expand_composites=True):
                    self._add([x] * len(ranks), tf.TensorSpec(x.shape, x.dtype), False)
            elif tf.is_tensor(values[0]):
                spec = _common_spec(values)
                rows = spec.shape.rank != 0
                if rows and spec.shape.rank is not None:
                    lengths.add(spec.shape[0])
                self._add(values, spec, rows)
            else:
                for x in tf.nest.flatten(values[0], expand_composites=True):
                    if tf.is_tensor(x):
                        self._add([x] * len(ranks), tf.TensorSpec(x.shape, x.dtype), False)
        own = lengths.pop() if len(lengths) == 1 else None
        # The same number of rows on every rank, known to the trace; else None.
        self.rows_of_rank = own or None
        self.static_rows = own * ways if own else None
        self.specs = [
            _with_rows(spec, self.static_rows) if rows else spec
            for spec, rows in zip(self.rank_specs, self.has_rows, strict=True)
        ]

    def _add(self, values: Sequence[tf.Tensor], spec: tf.TensorSpec, rows: bool) -> None:
        self.rank_specs.append(spec)
        self.has_rows.append(rows)
        for mine, value in zip(self.tensors, values, strict=True):
            mine.append(value)

    def packed(self, tensors: Sequence[tf.Tensor]) -> Any:
        """Returns the arguments of the step of flat tensors.

        Args:
            tensors: one for each of `specs`.

        Returns:
            (arguments, keyword arguments).
        """
        remaining = iter(tensors)

        def of(leaf):
            flat = tf.nest.flatten(leaf, expand_composites=True)
            flat = [next(remaining) if tf.is_tensor(x) else x for x in flat]
            return tf.nest.pack_sequence_as(leaf, flat, expand_composites=True)

        return tf.nest.pack_sequence_as(self._structure, [of(leaf) for leaf in self._leaves])


def _numbers_of_rows(columns: Sequence[Sequence[Any]], num_ranks: int) -> list[tf.Tensor]:
    for values in columns:
        is_dense = tf.is_tensor(values[0]) and values[0].shape.rank != 0
        if is_dense or isinstance(values[0], _COMPOSITES):
            return [num_rows(value) for value in values]
    return [tf.constant(0)] * num_ranks


def _joined(parts: Sequence[Any]) -> Any:
    with tf.device("CPU:0"):
        if isinstance(parts[0], tf.SparseTensor):
            return tf.sparse.concat(0, parts)
        return tf.concat(parts, 0)


def _with_rows(spec: tf.TensorSpec, rows: int | None) -> tf.TensorSpec:
    if spec.shape.rank is None:
        return spec
    return tf.TensorSpec([rows, *spec.shape[1:]], spec.dtype)


def _common_spec(values: Sequence[tf.Tensor]) -> tf.TensorSpec:
    """The narrowest spec that all ranks' tensors fit: rows of an uneven batch differ in number."""
    shape = values[0].shape
    for value in values[1:]:
        shape = shape.most_specific_compatible_shape(value.shape)
    return tf.TensorSpec(shape, values[0].dtype)
