"""Input: one global batch, split by rows over the parts of the batch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.strategies.engine.rows import no_rows, split_rows


class MeshDataset(_internal.DistributedDataset):
    """A dataset whose iterator gives every replica its rows of a step.

    Args:
        steps: yields, for each step, a tuple of one element for each replica of this process.
        is_split: whether the batch is split, also where this process has one part of it.
        batch_spec: spec of a batch before it is split or dealt out.
    """

    def __init__(self, steps: tf.data.Dataset, is_split: bool, batch_spec: Any):
        self._steps = steps
        self._is_split = is_split
        self.batch_spec = batch_spec

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

    Args:
        dataset: yields global batches, the same ones in every process.
        ways: number R of parts of the batch.
        parts: those of them that this process works on.

    Returns:
        A step for each global batch.
    """
    steps = dataset.map(
        lambda *batch: split_rows(_element(dataset, batch), ways, parts),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return MeshDataset(steps.prefetch(2), ways > 1, dataset.element_spec)


def deal_dataset(dataset: tf.data.Dataset, ways: int, is_split: bool) -> MeshDataset:
    """Deals batches out, one to each replica in turn.

    Args:
        dataset: yields the replicas' batches of each step, one after the other.
        ways: number of replicas of this process.
        is_split: whether there are others than one.

    Returns:
        A step for each `ways` batches; where the last ones do not suffice, the remaining replicas
        get batches of no rows. Elements that are not batches have to suffice.
    """
    empty = tf.nest.map_structure(no_rows, dataset.element_spec)
    has_rows = all(batch is not None for batch in tf.nest.flatten(empty))

    def deal(*window):
        batches = tf.data.Dataset.zip(_element(dataset, window))
        if has_rows:
            batches = batches.concatenate(tf.data.Dataset.from_tensors(empty).repeat(ways))
        else:
            _check_all_there(batches, ways)
        return tuple(batches.skip(i).take(1).get_single_element() for i in range(ways))

    steps = dataset.window(ways).map(deal, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return MeshDataset(steps.prefetch(2), is_split, dataset.element_spec)


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
    tensors = tf.nest.map_structure(_as_tensor, batch)
    parts = strategy.extended.local_batch_parts
    return regroup_rows(split_rows(tensors, mesh.batch_ways, parts), is_split=True)


def regroup_rows(parts: tuple, is_split: bool) -> Any:
    """Turns a tuple of one element for each replica into an element of per-replica values.

    Args:
        parts: one element for each replica of this process.
        is_split: whether there are others than one; else the element stays as it is.

    Returns:
        The element.
    """
    if not is_split:
        return parts[0]
    return tf.nest.map_structure(_regrouped, *parts)


def _as_tensor(x: Any) -> Any:
    is_tensor = x is None or isinstance(x, tf.Tensor | _internal.CompositeTensor)
    return x if is_tensor else tf.convert_to_tensor(x)


def _regrouped(*values: Any) -> Any:
    """A per-replica value; what stands for None stays as it is, and Keras finds it."""
    if values[0] is None or isinstance(values[0], tf.experimental.Optional):
        return values[0]
    return _internal.regroup(values, always_wrap=len(values) == 1)


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
    return tf.nest.map_structure(_regrouped_spec, *specs)


def _regrouped_spec(*specs: Any) -> Any:
    return specs[0] if isinstance(specs[0], tf.OptionalSpec) else _internal.PerReplicaSpec(*specs)


def _element(dataset: tf.data.Dataset, arguments: tuple) -> Any:
    """The element of a dataset from the arguments of its `map`, which takes tuples apart."""
    return arguments if type(dataset.element_spec) is tuple else arguments[0]


def _check_all_there(elements: tf.data.Dataset, ways: int) -> None:
    """Refuses a step in which a replica has no element, and none without rows can be made up."""
    count = elements.reduce(0, lambda count, *_: count + 1)
    message = (
        "The dataset that the function given to distribute_datasets_from_function returns ends "
        f"before each of {ways} replicas has an element for the last step. A batch of no rows "
        f"would stand in for it, but these are no batches: {elements.element_spec}. Batch the "
        "dataset by context.get_per_replica_batch_size(global_batch_size), or give it a multiple "
        f"of {ways} elements."
    )
    tf.debugging.Assert(tf.equal(count, ways), [message, "Elements:", count])
