"""Rules of tensor lists and optionals, which have the placement of their elements.

In a list that is sharded along a dimension, each rank's elements are its entries along it. An empty
or reserved list is made in the placement in which it is needed.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from llmos_tf.partition.graph.choice import Choice, Rule, can_shard, reduced, same, sharded_dim
from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import REPLICATED, Placement, Sharded


def empty(node: Node, dim: int) -> Choice | None:
    """Makes a list without elements, or whose elements are all to be set."""

    def emit(emission, node, inputs):
        shape, size = inputs
        return emission.copy(node, [_open_shape(emission, node, 0, shape, dim), size])

    return same(node, [REPLICATED, REPLICATED], Sharded(dim), emit)


def no_value(node: Node, dim: int) -> Choice | None:
    """Makes an optional without a value."""
    return same(node, [], Sharded(dim))


def optional(node: Node, dim: int) -> Choice | None:
    """Makes an optional of one value."""
    if len(node.inputs) != 1 or not can_shard(node.inputs[0], dim):
        return None
    return same(node, [Sharded(dim)], Sharded(dim))


def set_item(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Stores an element, which decides how the list is sharded."""
    item = len(inputs) - 1
    dim = sharded_dim(reduced(inputs[item]))
    if dim is None:
        dim = sharded_dim(inputs[0])
    if dim is None or not can_shard(node.inputs[item], dim) or not can_shard(node.outputs[0], dim):
        return None
    needed: list[Placement] = [REPLICATED] * len(inputs)
    needed[0] = needed[item] = Sharded(dim)
    return same(node, needed, Sharded(dim))


def get_item(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Reads an element; takes it from the list, where it is the last."""
    dim = sharded_dim(inputs[0])
    if dim is None or not all(can_shard(value, dim) for value in node.outputs):
        return None
    needed = [Sharded(dim)] + [REPLICATED] * (len(inputs) - 1)
    return same(node, needed, Sharded(dim), _with_local_elements(node.inputs[0], dim))


def stack(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Stacks elements along a new dimension, which comes first."""
    dim = sharded_dim(inputs[0])
    if dim is None or not can_shard(node.outputs[0], dim + 1):
        return None
    needed = [Sharded(dim)] + [REPLICATED] * (len(inputs) - 1)
    return same(node, needed, Sharded(dim + 1), _with_local_elements(node.inputs[0], dim))


def concat(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Concatenates elements along their first dimension."""
    dim = sharded_dim(inputs[0])
    if not dim or not can_shard(node.outputs[0], dim):
        return None
    needed = (Sharded(dim), *[REPLICATED] * (len(inputs) - 1))
    emit = _with_local_elements(node.inputs[0], dim)
    return Choice(needed, (Sharded(dim), REPLICATED), emit)


def from_tensor(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Takes a tensor apart along its first dimension."""
    dim = sharded_dim(reduced(inputs[0]))
    if not dim:
        return None
    split = node.type == "TensorListSplit"
    own = dim if split else dim - 1
    if not can_shard(node.outputs[0], own):
        return None
    place = 1 if node.type in ("TensorListFromTensor", "TensorListSplit") else 2

    def emit(emission, node, inputs):
        inputs = list(inputs)
        inputs[place] = _open_shape(emission, node, place, inputs[place], own)
        return emission.copy(node, inputs)

    needed = [Sharded(dim)] + [REPLICATED] * (len(inputs) - 1)
    return same(node, needed, Sharded(own), emit)


def scatter_into(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Stores the entries of a tensor along its first dimension as elements."""
    dim = sharded_dim(reduced(inputs[1]))
    dim = sharded_dim(inputs[0]) if not dim else dim - 1
    if dim is None or not can_shard(node.inputs[1], dim + 1) or not can_shard(node.outputs[0], dim):
        return None
    return same(node, [Sharded(dim), Sharded(dim + 1), REPLICATED], Sharded(dim))


def keep(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Keeps the placement of the list."""
    return same(node, [inputs[0]] + [REPLICATED] * (len(inputs) - 1), inputs[0])


def count(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Asks what all ranks' lists agree about."""
    return same(node, inputs, REPLICATED)


def element_shape(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Tells the global shape of the elements, as their dimensions are known."""
    value, dim = node.inputs[0], sharded_dim(inputs[0])
    if value.dims is None:
        return None

    def emit(emission, node, inputs):
        # A list that does not know how many dimensions its elements have tells -1.
        shape = tf.broadcast_to(emission.copy(node, inputs)[0], [len(value.dims)])
        for place, known in enumerate(value.dims):
            if known is not None and known.length is not None:
                shape = emission.with_entry(shape, place, known.length)
            elif place == dim and known.is_fixed:
                length = known.row_factor * emission.all_rows
                shape = tf.where(shape < 0, shape, emission.with_entry(shape, dim, length))
        return [shape]

    return same(node, inputs, REPLICATED, emit)


def value_of(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Takes the value of an optional."""
    dim = sharded_dim(inputs[0])
    if len(node.outputs) != 1 or dim is None or not can_shard(node.outputs[0], dim):
        return None

    def emit(emission, node, inputs):
        attributes = dict(node.attr)
        shape = emission.static_shape(node.outputs[0], Sharded(dim))
        attributes["output_shapes"] = tf.compat.v1.AttrValue(
            list=tf.compat.v1.AttrValue.ListValue(shape=[shape.as_proto()])
        )
        return emission.copy(node, inputs, attributes)

    return same(node, inputs, Sharded(dim), emit)


def _with_local_elements(value: Value, dim: int):
    """Returns what makes an op whose second or third input is the shape of the elements."""

    def emit(emission, node, inputs):
        inputs = list(inputs)
        place = 2 if node.type in ("TensorListGather", "TensorListGetItem") else 1
        if len(inputs) > place and node.inputs[place].dtype in (tf.int32, tf.int64):
            inputs[place] = _local_shape(emission, node, place, value, inputs[place], dim)
        return emission.copy(node, inputs)

    return emit


def _local_shape(
    emission: Any, node: Node, place: int, value: Value, shape: tf.Tensor, dim: int
) -> tf.Tensor:
    """The shape of a rank's elements; where it has none yet, zeros of that shape are read."""
    if node.inputs[place].rank != 1 or value.elements.dtype == tf.variant:
        return shape
    if not value.dims[dim].is_fixed:
        return _open_shape(emission, node, place, shape, dim)
    whole = emission.with_entry(shape, dim, emission.own_rows * value.dims[dim].row_factor)
    return tf.where(shape < 0, shape, whole)


def _open_shape(emission: Any, node: Node, place: int, shape: tf.Tensor, dim: int) -> tf.Tensor:
    """The shape of elements, without their length along the sharded dimension."""
    # An element that is a list, or one of unknown shape, has no dimensions here.
    is_list = node.attr["element_dtype"].type == tf.variant.as_datatype_enum
    has_dims = node.inputs[place].rank == 1 and not is_list
    return emission.with_entry(shape, dim, -1) if has_dims else shape


CREATIONS = {
    "EmptyTensorList": empty,
    "OptionalFromValue": optional,
    "OptionalNone": no_value,
    "TensorListReserve": empty,
}

RULES: dict[str, Rule] = {
    "OptionalGetValue": value_of,
    "OptionalHasValue": count,
    "TensorListConcatV2": concat,
    "TensorListElementShape": element_shape,
    "TensorListFromTensor": from_tensor,
    "TensorListGather": stack,
    "TensorListGetItem": get_item,
    "TensorListLength": count,
    "TensorListPopBack": get_item,
    "TensorListPushBack": set_item,
    "TensorListResize": keep,
    "TensorListScatter": from_tensor,
    "TensorListScatterIntoExistingList": scatter_into,
    "TensorListScatterV2": from_tensor,
    "TensorListSetItem": set_item,
    "TensorListSplit": from_tensor,
    "TensorListStack": stack,
}
