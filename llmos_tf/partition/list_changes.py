"""Changes of the placement of a tensor list: of all its elements at once."""

from typing import Any

import tensorflow as tf

from llmos_tf.partition.graph.placements import REPLICATED


def change_list(emission: Any, change: Any, x: tf.Tensor) -> tf.Tensor:
    """Changes the placement of a list, of which no element may be unset.

    Args:
        emission: of the program of the rank.
        change: the change.
        x: the rank's list.

    Returns:
        The rank's list in the other placement.

    Raises:
        ValueError: a list of lists, or one whose elements have no common shape.
    """
    value, source, target = change
    dtype = value.elements.dtype
    if dtype in (None, tf.variant) or value.dims is None:
        raise ValueError(
            f"{value.node.name} ({value.node.type}) holds values of which each rank of the mesh "
            "has a part, and something needs them whole, which is not supported for lists of lists "
            "and for optional values. Store tensors in a tf.TensorArray instead."
        )
    lengths = emission.static_dims(value, source)
    stacked = tf.raw_ops.TensorListStack(
        input_handle=x,
        element_shape=tf.constant([-1 if n is None else n for n in lengths], tf.int32),
        element_dtype=dtype,
    )
    stacked.set_shape([None, *lengths])
    dim = target.dim if source == REPLICATED else source.dim
    make = emission.own if source == REPLICATED else emission.gathered
    changed = make(value.dims[dim], dim + 1, stacked)
    shape = tf.shape(changed)[1:]
    return tf.raw_ops.TensorListFromTensor(tensor=changed, element_shape=shape)
