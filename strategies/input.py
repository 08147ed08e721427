"""Input: one global batch, split by rows over the parts of the batch."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal


class MeshDataset(_internal.DistributedDatasetInterface):
    """A dataset of global batches whose iterator gives every replica its rows.

    A batch of n rows over R replicas gives replica i the rows from i·n/R to (i+1)·n/R, so that an
    uneven or small last batch is split too, and every row is used once.

    Args:
        dataset: yields global batches.
        extended: the strategy's `MeshExtended`.
    """

    def __init__(self, dataset: tf.data.Dataset, extended: Any):
        self._dataset = dataset
        self._extended = extended
        ways = extended.mesh.batch_ways
        self._split = dataset.map(
            lambda *batch: _split_rows(batch[0] if len(batch) == 1 else batch, ways),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        ).prefetch(2)

    def __iter__(self) -> "MeshIterator":
        if not tf.executing_eagerly():
            raise RuntimeError(
                "Iterating over a distributed dataset inside tf.function is not supported; "
                "make the iterator outside and pass it in: step(iter(dataset))."
            )
        return MeshIterator(iter(self._split), self._extended)

    @property
    def element_spec(self) -> Any:
        """Spec of a global batch."""
        return self._dataset.element_spec

    @property
    def cardinality(self) -> tf.Tensor:
        """Number of global batches, as `tf.data` counts."""
        return self._dataset.cardinality()

    def __len__(self) -> int:
        return len(self._dataset)

    def reduce(self, initial_state: Any, reduce_func: Callable[[Any, Any], Any]) -> Any:
        """Folds the elements; as `tf.data.Dataset.reduce`, over per-replica values.

        Args:
            initial_state: start value.
            reduce_func: (state, element) to state.

        Returns:
            The last state.
        """
        state = initial_state
        for element in self:
            state = reduce_func(state, element)
        return state


class MeshIterator(_internal.DistributedIteratorInterface, _internal.CompositeTensor):
    """Iterator of per-replica values; may be passed to a `tf.function`.

    Args:
        iterator: a tf.data iterator over tuples of one element for each replica.
        extended: the strategy's `MeshExtended`.
    """

    def __init__(self, iterator: Any, extended: Any):
        self._iterator = iterator
        self._extended = extended

    def __iter__(self) -> "MeshIterator":
        return self

    def __next__(self) -> Any:
        try:
            return self.get_next()
        except tf.errors.OutOfRangeError:
            raise StopIteration from None

    def get_next(self) -> Any:
        """Returns the next batch as per-replica values."""
        return regroup_rows(self._iterator.get_next())

    def get_next_as_optional(self) -> "MeshOptional":
        """Returns the next batch, or an empty optional at the end."""
        return MeshOptional(self._iterator.get_next_as_optional())

    @property
    def element_spec(self) -> Any:
        """Spec of the per-replica elements, as a tuple with one for each replica."""
        return self._iterator.element_spec

    @property
    def _type_spec(self) -> "MeshIteratorSpec":
        return MeshIteratorSpec(tf.type_spec_from_value(self._iterator), self._extended)


class MeshIteratorSpec(tf.TypeSpec):
    """Type of a `MeshIterator`.

    Args:
        inner: type of its tf.data iterator.
        extended: the strategy's `MeshExtended`.
    """

    def __init__(self, inner: tf.TypeSpec, extended: Any):
        self._inner = inner
        self._extended = extended

    @property
    def value_type(self) -> type:
        """The class it describes."""
        return MeshIterator

    def _serialize(self) -> tuple:
        return (self._inner,)

    # On the instance, because the strategy is not part of what is serialized.
    def _deserialize(self, serialization: tuple) -> "MeshIteratorSpec":
        return MeshIteratorSpec(serialization[0], self._extended)

    @property
    def _component_specs(self) -> Any:
        return (self._inner,)

    def _to_components(self, value: MeshIterator) -> Any:
        return (value._iterator,)

    def _from_components(self, components: Any) -> MeshIterator:
        return MeshIterator(components[0], self._extended)

    def is_compatible_with(self, spec_or_value: Any) -> bool:
        """Returns whether a value or spec is of this type.

        Args:
            spec_or_value: what to compare with.

        Returns:
            True where the inner iterators' types agree.
        """
        other = spec_or_value
        if isinstance(other, MeshIterator):
            other = other._type_spec
        return isinstance(other, MeshIteratorSpec) and self._inner.is_compatible_with(other._inner)

    def __hash__(self) -> int:
        return hash((type(self), self._inner))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeshIteratorSpec) and self._inner == other._inner


class MeshOptional(_internal.CompositeTensor):
    """A batch that may be missing, as per-replica values.

    Args:
        optional: a `tf.experimental.Optional` of a tuple with one element for each replica.
    """

    def __init__(self, optional: tf.experimental.Optional):
        self._optional = optional

    def has_value(self) -> tf.Tensor:
        """Returns whether there is a batch, bool scalar."""
        return self._optional.has_value()

    def get_value(self) -> Any:
        """Returns the batch as per-replica values."""
        return regroup_rows(self._optional.get_value())

    @property
    def _type_spec(self) -> "MeshOptionalSpec":
        return MeshOptionalSpec(tf.type_spec_from_value(self._optional))


class MeshOptionalSpec(tf.TypeSpec):
    """Type of a `MeshOptional`.

    Args:
        inner: type of the optional inside.
    """

    def __init__(self, inner: tf.TypeSpec):
        self._inner = inner

    @property
    def value_type(self) -> type:
        """The class it describes."""
        return MeshOptional

    def _serialize(self) -> tuple:
        return (self._inner,)

    @property
    def _component_specs(self) -> Any:
        return (self._inner,)

    def _to_components(self, value: MeshOptional) -> Any:
        return (value._optional,)

    def _from_components(self, components: Any) -> MeshOptional:
        return MeshOptional(components[0])


def split_batch(batch: Any, strategy: tf.distribute.Strategy) -> Any:
    """Splits a global batch by rows over the replicas of a strategy.

    Args:
        batch: nested tensors, each with the rows of the batch in its first dimension; None stays
            None, and what is per-replica already stays as it is.
        strategy: a mesh strategy, or any other, for which nothing is split.

    Returns:
        The same structure of per-replica values.
    """
    mesh = getattr(strategy.extended, "mesh", None)
    values = [v for v in tf.nest.flatten(batch) if v is not None]
    is_split = any(isinstance(v, tf.distribute.DistributedValues) for v in values)
    if mesh is None or mesh.batch_ways == 1 or is_split:
        return batch
    tensors = tf.nest.map_structure(lambda x: x if x is None else tf.convert_to_tensor(x), batch)
    return regroup_rows(_split_rows(tensors, mesh.batch_ways))


def regroup_rows(parts: tuple) -> Any:
    """Turns a tuple of one element for each replica into an element of per-replica values.

    Args:
        parts: one element for each replica.

    Returns:
        The element; as it is where there is one replica.
    """
    return _internal.regroup(tuple(parts))


def _split_rows(batch: Any, ways: int) -> tuple:
    """One structure like `batch` for each replica."""
    return tuple(
        tf.nest.map_structure(lambda x, i=i: _rows(x, i, ways), batch) for i in range(ways)
    )


def _rows(x: Any, index: int, ways: int) -> Any:
    if ways == 1 or x is None:
        return x
    static = x.shape[0] if x.shape.rank is not None else None
    if static is not None:
        return x[index * static // ways : (index + 1) * static // ways]
    rows = x.nrows() if isinstance(x, tf.RaggedTensor) else tf.shape(x)[0]
    return x[index * rows // ways : (index + 1) * rows // ways]
