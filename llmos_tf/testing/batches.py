"""The batches of a verification: taken once, checked, and the same ones in every run."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def take_batches(batches: Iterable[Any], count: int) -> list[tuple]:
    """Takes the first batches of an iterable, which may be endless.

    Args:
        batches: yields global batches ``(x, y)`` or ``(x, y, sample_weights)``, each nested arrays
            or tensors whose first dimension counts rows.
        count: how many to take at most.

    Returns:
        Batches of numpy arrays, lists in them as tuples, floats in Keras's `floatx`.

    Raises:
        ValueError: there is none, or one is no batch, or unlike the others.
    """
    if not isinstance(batches, Iterable):
        raise ValueError(
            "Batches are an iterable of (x, y) or (x, y, sample_weights). "
            f"Received: {_short(batches)}."
        )
    taken = [
        _checked(batch, number)
        for number, batch in enumerate(itertools.islice(batches, count), start=1)
    ]
    if not taken:
        raise ValueError(
            "There are no batches. Give an iterable that yields at least one (x, y) or "
            "(x, y, sample_weights); a generator that was used before is empty."
        )
    for number, batch in enumerate(taken, start=1):
        for one, other in zip(_described(taken[0]), _described(batch), strict=False):
            if one != other:
                raise ValueError(
                    f"Batches may differ in their number of rows and in lengths. Batch 1 has {one} "
                    f"where batch {number} has {other}."
                )
        if len(_described(taken[0])) != len(_described(batch)):
            raise ValueError(f"Batch {number} has another structure than batch 1.")
    return taken


def rows_of(batch: tuple) -> int:
    """Returns the number of rows of a batch.

    Args:
        batch: as `take_batches` returns it.

    Returns:
        The length of its arrays' first dimension.
    """
    return len(tf.nest.flatten(batch)[0])


def as_dataset(batches: list[tuple]) -> tf.data.Dataset:
    """Returns a dataset of batches, which may differ in rows and lengths.

    Args:
        batches: as `take_batches` returns them.

    Returns:
        The dataset, in their order.
    """
    signature = tf.nest.map_structure(_spec, *batches)
    dataset = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)
    # Known, or Keras warns at the end that the data did not suffice.
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))


def _checked(batch: Any, number: int) -> tuple:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        what = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            "A batch is (x, y) or (x, y, sample_weights). "
            f"Received: as batch {number}, {what or _short(batch)}."
        )
    if batch[-1] is None:
        # (x, y, None): no weights.
        batch = batch[:-1]
    batch = tuple(_arrays(part) for part in batch)
    leaves = tf.nest.flatten(batch)
    rows = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(rows) != 1 or None in rows or 0 in rows:
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        raise ValueError(
            "All arrays of a batch have the same number of rows in their first dimension, at least "
            f"one. Received: as batch {number}, the shapes {shapes}."
        )
    return batch


def _arrays(value: Any) -> Any:
    """Nested numpy arrays, as Keras's data adapters make them."""
    if isinstance(value, dict):
        return {key: _arrays(part) for key, part in value.items()}
    if isinstance(value, tuple | list) and not all(np.isscalar(part) for part in value):
        return tuple(_arrays(part) for part in value)
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(
            f"A batch holds arrays, in dicts and tuples if need be. Received: {_short(value)}."
        )
    return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array


def _described(batch: tuple) -> list[str]:
    """One line for each array: what all batches have in common."""
    names = _names(batch)
    leaves = tf.nest.flatten(batch)
    return [
        f"{name} with {leaf.ndim} dimensions of {leaf.dtype}"
        for name, leaf in zip(names, leaves, strict=True)
    ]


def _names(value: Any, prefix: str = "") -> Iterator[str]:
    """Names of the arrays, in the order of `tf.nest.flatten`."""
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _names(value[key], f"{prefix}[{key!r}]")
    elif isinstance(value, tuple):
        top = ("x", "y", "sample_weights")
        for index, part in enumerate(value):
            yield from _names(part, f"{prefix}[{index}]" if prefix else top[index])
    else:
        yield prefix


def _spec(*arrays: np.ndarray) -> tf.TensorSpec:
    lengths = [set(dims) for dims in zip(*(array.shape[1:] for array in arrays), strict=True)]
    shape = [None, *(dim.pop() if len(dim) == 1 else None for dim in lengths)]
    return tf.TensorSpec(shape, tf.as_dtype(arrays[0].dtype))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
