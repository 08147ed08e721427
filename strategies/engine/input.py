"""Input: one global batch, split by rows over the parts of the batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal


class MeshDataset(_internal.DistributedDataset):
    """A dataset whose iterator gives every replica its rows of a step.

    Args:
        steps: yields, for each step, a tuple of one element for each replica of this process.
        is_split: whether the batch is split, also where this process has one part of it.
    """

    def __init__(self, steps: tf.data.Dataset, is_split: bool):
        self._steps = steps
        self._is_split = is_split

    def __iter__(self) -> "MeshIterator":
        if not tf.executing_eagerly():
            raise RuntimeError(
                "Inside tf.function a distributed dataset is iterated over by a `for` statement "
                "that AutoGraph converts. For another use make the iterator outside and pass it "
                "in: step(iter(dataset))."
            )
        return MeshIterator(iter(self._steps), self._is_split)

    @property
    def element_spec(self) -> Any:
        """Spec of the per-replica elements, for the `input_signature` of a step."""
        return regroup_specs(self._steps.element_spec, self._is_split)

    @property
    def cardinality(self) -> tf.Tensor:
        """Number of steps, as `tf.data` counts."""
        return self._steps.cardinality()

    def __len__(self) -> int:
        return len(self._steps)

    def reduce(self, initial_state: Any, reduce_func: Callable[[Any, Any], Any]) -> Any:
        """Folds the elements; as `tf.data.Dataset.reduce`, over per-replica values.

        AutoGraph makes this of a `for` statement inside `tf.function`.

        Args:
            initial_state: start value.
            reduce_func: (state, element) to state.

        Returns:
            The last state.
        """
        if tf.executing_eagerly():
            return functools.reduce(reduce_func, self, initial_state)
        iterator = MeshIterator(iter(self._steps), self._is_split)

        def body(element, state):
            state = reduce_func(state, element.get_value())
            return iterator.get_next_as_optional(), state

        _, state = tf.while_loop(
            lambda element, state: element.has_value(),
            body,
            (iterator.get_next_as_optional(), initial_state),
            parallel_iterations=1,
        )
        return state


def split_dataset(dataset: tf.data.Dataset, ways: int, parts: Sequence[int]) -> MeshDataset:
    """Splits each global batch by rows.

    A batch of n rows over R replicas gives replica i the rows from i·n/R to (i+1)·n/R, so that an
    uneven or small last batch is split too, and every row is used once.

    Args:
        dataset: yields global batches, the same ones in every process.
        ways: number R of parts of the batch.
        parts: those of them that this process works on.

    Returns:
        A step for each global batch.
    """
    steps = dataset.map(
        lambda *batch: _split_rows(_element(batch), ways, parts),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return MeshDataset(steps.prefetch(2), is_split=ways > 1)


def deal_dataset(dataset: tf.data.Dataset, ways: int, is_split: bool) -> MeshDataset:
    """Deals batches out, one to each replica in turn.

    Args:
        dataset: yields the replicas' batches of each step, one after the other.
        ways: number of replicas of this process.
        is_split: whether there are others than one.

    Returns:
        A step for each `ways` batches; where the last ones do not suffice, the remaining replicas
        get batches of no rows.
    """
    empty = tf.data.Dataset.from_tensors(tf.nest.map_structure(_no_rows, dataset.element_spec))

    def deal(*window):
        batches = tf.data.Dataset.zip(_element(window)).concatenate(empty.repeat(ways))
        return tuple(batches.skip(i).take(1).get_single_element() for i in range(ways))

    steps = dataset.window(ways).map(deal, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return MeshDataset(steps.prefetch(2), is_split)


class MeshIterator(_internal.DistributedIteratorInterface, _internal.CompositeTensor):
    """Iterator of per-replica values; may be passed to a `tf.function`.

    Args:
        iterator: a tf.data iterator over tuples of one element for each replica.
        is_split: whether the batch is split, also where this process has one part of it.
    """

    def __init__(self, iterator: Any, is_split: bool):
        self._iterator = iterator
        self._is_split = is_split

    def __iter__(self) -> "MeshIterator":
        return self

    def __next__(self) -> Any:
        try:
            return self.get_next()
        except tf.errors.OutOfRangeError:
            raise StopIteration from None

    def get_next(self) -> Any:
        """Returns the next batch as per-replica values."""
        batch = regroup_rows(self._iterator.get_next(), self._is_split)
        if not self._is_split or not tf.executing_eagerly():
            return batch
        return tf.nest.map_structure(_declared, batch, self.element_spec)

    def get_next_as_optional(self) -> "MeshOptional":
        """Returns the next batch, or an empty optional at the end."""
        return MeshOptional(self._iterator.get_next_as_optional(), self._is_split)

    @property
    def element_spec(self) -> Any:
        """Spec of the per-replica elements."""
        return regroup_specs(self._iterator.element_spec, self._is_split)

    @property
    def _type_spec(self) -> "MeshIteratorSpec":
        return MeshIteratorSpec(tf.type_spec_from_value(self._iterator), self._is_split)


class RowsPerReplica(_internal.PerReplica):
    """Rows of a batch whose type is that of their dataset, where a `tf.function` is given them.

    By their own shapes one process would trace a step again, for the rows of an uneven batch, while
    another, whose rows are as many as before, would not; and each would wait for the other.

    Args:
        values: a tensor for each replica of this process.
        spec: the dataset's per-replica spec.
    """

    def __init__(self, values: tuple, spec: tf.TypeSpec):
        super().__init__(values)
        self._spec = spec

    @property
    def _type_spec(self) -> tf.TypeSpec:
        return self._spec


def _declared(value: Any, spec: tf.TypeSpec) -> Any:
    """A per-replica value of the type that its dataset declares."""
    return RowsPerReplica(value.values, spec) if type(value) is _internal.PerReplica else value


class MeshIteratorSpec(tf.TypeSpec):
    """Type of a `MeshIterator`.

    Args:
        inner: type of its tf.data iterator.
        is_split: whether the batch is split, also where this process has one part of it.
    """

    def __init__(self, inner: tf.TypeSpec, is_split: bool):
        self._inner = inner
        self._is_split = is_split

    @property
    def value_type(self) -> type:
        """The class it describes."""
        return MeshIterator

    def _serialize(self) -> tuple:
        return (self._inner, self._is_split)

    @property
    def _component_specs(self) -> Any:
        return (self._inner,)

    def _to_components(self, value: MeshIterator) -> Any:
        return (value._iterator,)

    def _from_components(self, components: Any) -> MeshIterator:
        return MeshIterator(components[0], self._is_split)

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
        return hash((type(self), self._inner, self._is_split))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeshIteratorSpec) and self._serialize() == other._serialize()


class MeshOptional(_internal.CompositeTensor):
    """A batch that may be missing, as per-replica values.

    Args:
        optional: a `tf.experimental.Optional` of a tuple with one element for each replica.
        is_split: whether the batch is split, also where this process has one part of it.
    """

    def __init__(self, optional: tf.experimental.Optional, is_split: bool):
        self._optional = optional
        self._is_split = is_split

    def has_value(self) -> tf.Tensor:
        """Returns whether there is a batch, bool scalar."""
        return self._optional.has_value()

    def get_value(self) -> Any:
        """Returns the batch as per-replica values."""
        return regroup_rows(self._optional.get_value(), self._is_split)

    @property
    def _type_spec(self) -> "MeshOptionalSpec":
        return MeshOptionalSpec(tf.type_spec_from_value(self._optional), self._is_split)


class MeshOptionalSpec(tf.TypeSpec):
    """Type of a `MeshOptional`.

    Args:
        inner: type of the optional inside.
        is_split: whether the batch is split, also where this process has one part of it.
    """

    def __init__(self, inner: tf.TypeSpec, is_split: bool):
        self._inner = inner
        self._is_split = is_split

    @property
    def value_type(self) -> type:
        """The class it describes."""
        return MeshOptional

    def _serialize(self) -> tuple:
        return (self._inner, self._is_split)

    @property
    def _component_specs(self) -> Any:
        return (self._inner,)

    def _to_components(self, value: MeshOptional) -> Any:
        return (value._optional,)

    def _from_components(self, components: Any) -> MeshOptional:
        return MeshOptional(components[0], self._is_split)


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
    parts = strategy.extended.local_batch_parts
    return regroup_rows(_split_rows(tensors, mesh.batch_ways, parts), is_split=True)


def regroup_rows(parts: tuple, is_split: bool) -> Any:
    """Turns a tuple of one element for each replica into an element of per-replica values.

    Args:
        parts: one element for each replica of this process.
        is_split: whether there are others than one; else the element stays as it is.

    Returns:
        The element.
    """
    if is_split and len(parts) == 1:
        return tf.nest.map_structure(_alone, parts[0])
    return _internal.regroup(tuple(parts))


def _alone(x: Any) -> Any:
    """A per-replica value of one replica; None stays None."""
    return x if x is None else _internal.regroup((x,), always_wrap=True)


def regroup_specs(specs: tuple, is_split: bool) -> Any:
    """Turns a tuple of one spec for each replica into the spec of `regroup_rows`' result.

    Args:
        specs: the same structure of specs for each replica.
        is_split: as there.

    Returns:
        That structure, of specs of per-replica values.
    """
    if not is_split:
        return specs[0]
    return tf.nest.map_structure(lambda *parts: _internal.PerReplicaSpec(*parts), *specs)


def _element(arguments: tuple) -> Any:
    """The element of a dataset from the arguments of its `map`, which takes tuples apart."""
    return arguments[0] if len(arguments) == 1 else arguments


def _no_rows(spec: Any) -> tf.Tensor:
    """A batch like others of a dataset, of no rows."""
    if not isinstance(spec, tf.TensorSpec) or not spec.shape.rank:
        raise ValueError(
            "The function given to distribute_datasets_from_function returns a dataset of batches: "
            "dense tensors whose first dimension counts rows. Batch it by "
            f"context.get_per_replica_batch_size(global_batch_size). Received: {spec}."
        )
    return tf.zeros([0, *(length or 0 for length in spec.shape[1:])], spec.dtype)


def _split_rows(batch: Any, ways: int, parts: Sequence[int]) -> tuple:
    """One structure like `batch` for each of `parts`."""
    return tuple(tf.nest.map_structure(lambda x, i=i: _rows(x, i, ways), batch) for i in parts)


def _rows(x: Any, index: int, ways: int) -> Any:
    if ways == 1 or x is None:
        return x
    static = x.shape[0] if x.shape.rank is not None else None
    if static is not None and static % ways == 0:
        return x[index * static // ways : (index + 1) * static // ways]
    if isinstance(x, tf.Tensor) and static is not None and tf.is_symbolic_tensor(x):
        # Other parts of the batch, of which another process knows, have other lengths: so that all
        # trace the same program, none knows the length of its own.
        x = tf.compat.v1.placeholder_with_default(x, [None, *x.shape[1:]])
    rows = x.nrows() if isinstance(x, tf.RaggedTensor) else tf.shape(x)[0]
    return x[index * rows // ways : (index + 1) * rows // ways]
