"""Sums, means and concatenations over the replicas, outside and inside of programs.

Outside a program, `strategy.reduce` and `strategy.gather` add and concatenate what `strategy.run`
returned. Where other processes hold some of it, a small program does it by collectives, so every
process calls them alike.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal, collectives
from llmos_tf.collectives import batch
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.spmd.program import current_program


def values_of(value: Any) -> list[tf.Tensor]:
    """Returns a value's replicas, of this process, as tensors; one where it is not per-replica.

    Args:
        value: a per-replica value or one for all.

    Returns:
        Tensors.
    """
    parts = value.values if isinstance(value, tf.distribute.DistributedValues) else (value,)
    return [tf.convert_to_tensor(part) for part in parts]


def mean_of_parts(total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Mean over the replicas; whole numbers stay whole: Keras builds models on a mean of tokens.

    Args:
        total: sum over the replicas.
        count: for each element, how many replicas have it.

    Returns:
        Tensor like `total`.
    """
    return total // count if total.dtype.is_integer else total / count


def aligned(
    parts: Sequence[tf.Tensor], axis: int = 0, length: tf.Tensor | None = None
) -> list[tf.Tensor]:
    """Returns the parts filled up with zeros to one length: an uneven batch differs in rows.

    Args:
        parts: tensors that agree in all dimensions but one.
        axis: that dimension.
        length: to which they are filled up, the longest of them by default.

    Returns:
        Tensors of one shape.
    """
    if length is None:
        if len({tuple(part.shape.as_list()) for part in parts}) == 1:
            return list(parts)
        length = longest(parts, axis)
    return [tf.pad(part, _at(part, axis, [0, length - tf.shape(part)[axis]])) for part in parts]


def longest(parts: Sequence[tf.Tensor], axis: int = 0) -> tf.Tensor:
    """Returns the largest length of tensors along a dimension, int32 scalar.

    Args:
        parts: tensors.
        axis: the dimension.

    Returns:
        The length.
    """
    return tf.reduce_max([tf.shape(part)[axis] for part in parts])


def reduce_everywhere(extended: Any, value: Any, mean: bool) -> tf.Tensor:
    """Sums or averages over the replicas of all processes.

    Args:
        extended: the strategy's `MeshExtended`.
        value: what each replica of this process has.
        mean: whether to divide by the number of replicas that have an element.

    Returns:
        The result, in each process.
    """
    parts = values_of(value)
    if parts[0].shape.rank:
        parts = aligned(parts, length=_first(extended, _largest, longest(parts)))
    # Counted before they are filled up.
    ones = [tf.ones_like(part) for part in values_of(value)]
    total = _first(extended, _total, _internal.regroup(tuple(parts)))
    if not mean:
        return total
    if parts[0].shape.rank:
        ones = aligned(ones, length=tf.shape(total)[0])
    return mean_of_parts(total, _first(extended, _total, _internal.regroup(tuple(ones))))


def gather_everywhere(extended: Any, value: Any, axis: int) -> tf.Tensor:
    """Concatenates over the replicas of all processes.

    Args:
        extended: the strategy's `MeshExtended`.
        value: what each replica of this process has.
        axis: dimension, in which they may differ.

    Returns:
        The result, in each process.
    """
    parts = values_of(value)
    length = _first(extended, _largest, longest(parts, axis))
    # The same shape in every process, and rows moved to the front, so that one program does.
    front = [_swapped(part, axis) for part in aligned(parts, axis, length)]
    counts = tuple(tf.shape(part)[axis][tf.newaxis] for part in parts)
    rows = _first(extended, _concatenated, _internal.regroup(tuple(front)))
    counts = _first(extended, _concatenated, _internal.regroup(counts))
    return _swapped(tf.boolean_mask(rows, _mask(counts, length)), axis)


def all_gather(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Concatenates the replicas' tensors in a program; `ReplicaContext.all_gather`.

    Args:
        x: this replica's tensor.
        axis: dimension along which to concatenate; replicas may differ in it.

    Returns:
        The result, on every rank.
    """
    x = tf.convert_to_tensor(x)
    if x.shape[axis] is not None:
        return collectives.all_gather(x, BATCH_AXES, axis)
    counts = collectives.all_gather(tf.shape(x)[axis][tf.newaxis], BATCH_AXES)
    length = tf.reduce_max(counts)
    (filled,) = aligned([x], axis, length)
    gathered = collectives.all_gather(filled, BATCH_AXES, axis)
    return tf.boolean_mask(gathered, _mask(counts, length), axis=axis % x.shape.rank)


def run_gathering(extended: Any, fn: Callable, args: tuple, kwargs: dict) -> Any:
    """Runs a replica function, and concatenates what the replicas of all processes return.

    Args:
        extended: the strategy's `MeshExtended`.
        fn: a function that weighs rows, such as the step of `predict`.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        Its results, of all rows in the order of the batch, in each process.
    """

    if extended.partitions(fn):
        results = extended.engine.run(fn, args, kwargs, all_rows=True)
        return tf.nest.map_structure(lambda x: values_of(x)[0], results)

    @functools.wraps(fn)
    def everywhere(*args, **kwargs):
        result = tf.nest.map_structure(_of_all_rows, fn(*args, **kwargs))
        # All rows are no longer some rank's own.
        current_program().rows = None
        return result

    results = extended.engine.run(everywhere, args, kwargs)
    return tf.nest.map_structure(lambda x: values_of(x)[0], results)


def _of_all_rows(x: Any) -> tf.Tensor:
    x = tf.convert_to_tensor(x)
    return all_gather(batch.own_rows(x) if x.shape.rank else x[tf.newaxis], 0)


def _at(x: tf.Tensor, axis: int, padding: list) -> list:
    """Paddings of `x` that are zero but for one dimension."""
    paddings = [[0, 0]] * x.shape.rank
    paddings[axis] = padding
    return paddings


def _mask(counts: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """Which rows of parts that were filled up to `length` and concatenated are not filling."""
    return tf.reshape(tf.sequence_mask(counts, length), [-1])


def _swapped(x: tf.Tensor, axis: int) -> tf.Tensor:
    """Dimension `axis` and the first change places."""
    order = list(range(x.shape.rank))
    order[0], order[axis] = order[axis], order[0]
    return tf.transpose(x, order)


def _first(extended: Any, function: Any, value: Any) -> tf.Tensor:
    """What `function` returns in a program, the same on every rank."""
    result = extended.engine.run(function, (value,), {})
    return result.values[0] if isinstance(result, tf.distribute.DistributedValues) else result


# At module level: the engine knows a function that it has traced by its identity.


def _total(x):
    return collectives.all_reduce(x, BATCH_AXES)


def _largest(x):
    return collectives.all_reduce(x, BATCH_AXES, op="max")


def _concatenated(x):
    return collectives.all_gather(x, BATCH_AXES)
