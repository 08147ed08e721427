"""Tensors of a bucket (`llmos_tf.planning.buckets`), laid end to end, and when they are made."""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from llmos_tf.sharding.layout import pad_to


def creation_order(tensors: Mapping[int, tf.Tensor]) -> dict[int, int]:
    """Returns when the tensors of a program are made: the place of their ops in its graph.

    A tape makes the ops of the backward pass in the order in which it goes back, so it is also the
    order in which they run.

    Args:
        tensors: by index, of the graph that is being traced, or of one around it.

    Returns:
        Index to a number; 0 for what is an input of the graph.
    """
    graph = tf.compat.v1.get_default_graph()
    places = {op.name: place for place, op in enumerate(graph.get_operations())}
    return {i: places[x.op.name] if x.graph is graph else 0 for i, x in tensors.items()}


def packed(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Lays tensors end to end.

    Args:
        tensors: of one dtype and static shapes.

    Returns:
        Rank-1 tensor; for a single one without a copy.
    """
    flat = [tf.reshape(tensor, [-1]) for tensor in tensors]
    return flat[0] if len(flat) == 1 else tf.concat(flat, 0)


def unpacked(flat: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Cuts apart what `packed` has laid end to end.

    Args:
        flat: of as many elements.
        tensors: what was packed, or anything of those shapes.

    Returns:
        Tensors of those shapes.
    """
    lengths = [tensor.shape.num_elements() for tensor in tensors]
    parts = [flat] if len(lengths) == 1 else tf.split(flat, lengths)
    return [tf.reshape(part, x.shape) for part, x in zip(parts, tensors, strict=True)]


def packed_rows(tensors: Sequence[tf.Tensor], ways: int, multiple: int = 1) -> tf.Tensor:
    """Lays tensors into a row for each rank, each rank's part of every tensor side by side.

    Args:
        tensors: of one dtype and static shapes; each is filled up with zeros to `ways` equal parts.
        ways: ranks of the group.
        multiple: a divisor of the length of a row, which is filled up as well.

    Returns:
        ``[ways, length]``.
    """
    lengths = row_lengths(tensors, ways)
    rows = [
        tf.reshape(pad_to(tf.reshape(tensor, [-1]), ways * length), [ways, length])
        for tensor, length in zip(tensors, lengths, strict=True)
    ]
    missing = -sum(lengths) % multiple
    if missing:
        rows.append(tf.zeros([ways, missing], tensors[0].dtype))
    return rows[0] if len(rows) == 1 else tf.concat(rows, 1)


def unpacked_rows(rows: tf.Tensor, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Cuts apart what `packed_rows` has laid into rows.

    Args:
        rows: ``[ways, length]``.
        tensors: what was packed, for the shapes.

    Returns:
        Tensors of those shapes.
    """
    lengths = row_lengths(tensors, rows.shape[0])
    columns = split_columns(rows, lengths)
    flat = [tf.reshape(column, [-1]) for column in columns]
    counts = [x.shape.num_elements() for x in tensors]
    return [
        tf.reshape(one if one.shape[0] == count else one[:count], x.shape)
        for one, count, x in zip(flat, counts, tensors, strict=True)
    ]


def split_columns(rows: tf.Tensor, lengths: Sequence[int]) -> list[tf.Tensor]:
    """Cuts the last dimension into pieces, and leaves out what is left.

    Args:
        rows: any tensor.
        lengths: of the pieces.

    Returns:
        Tensors.
    """
    left = rows.shape[-1] - sum(lengths)
    if len(lengths) == 1 and not left:
        return [rows]
    return tf.split(rows, [*lengths, left], -1)[: len(lengths)]


def row_lengths(tensors: Sequence[tf.Tensor], ways: int) -> list[int]:
    """Returns how long a rank's part of each tensor is.

    Args:
        tensors: of static shapes.
        ways: into how many equal parts they are cut.

    Returns:
        Elements.
    """
    return [-(-tensor.shape.num_elements() // ways) for tensor in tensors]
