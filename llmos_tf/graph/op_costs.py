"""What an op of a graph costs, counted and not measured."""

import math

import tensorflow as tf

from llmos_tf import _internal

# In operations of a matrix product: an element that is read and written, as by an activation or a
# norm, takes as long as so many of them.
PER_ELEMENT = 30

_CALLS = ("PartitionedCall", "StatefulPartitionedCall", "While", "StatelessWhile")


def cost_of(op: tf.Operation) -> float:
    """Returns the cost of an op: of the product that it is, and of what it writes.

    Args:
        op: of a graph.

    Returns:
        Operations of a matrix product. Lengths that are not known count as 1.
    """
    return operations(op) + PER_ELEMENT * sum(map(elements, op.outputs))


def elements(x: tf.Tensor) -> float:
    """Returns the number of elements of a tensor.

    Args:
        x: of a graph.

    Returns:
        The number. Lengths that are not known count as 1.
    """
    if x.dtype in (tf.variant, tf.resource):
        return 0.0
    if x.shape.rank is None:
        return 1.0
    return float(math.prod(length or 1 for length in x.shape))


def operations(op: tf.Operation) -> float:
    """Returns the multiplications and additions of a product or convolution; 0 for what is none.

    Args:
        op: of a graph.

    Returns:
        The number.
    """
    if op.type in ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        a = op.inputs[0].shape
        transposed = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
        inner = a[-2 if transposed else -1] if a.rank else None
        return 2.0 * elements(op.outputs[0]) * (inner or 1)
    if op.type == "Einsum" and len(op.inputs) == 2:
        left, right = (elements(x) for x in op.inputs)
        # Every index is in two of the three: the product of their sizes is that of all, squared.
        return 2.0 * math.sqrt(left * right * elements(op.outputs[0]))
    if op.type in ("Conv2D", "Conv3D", "DepthwiseConv2dNative"):
        kernel = op.inputs[1].shape
        per_output = math.prod(length or 1 for length in kernel[:-1])
        return 2.0 * elements(op.outputs[0]) * per_output
    if op.type in _CALLS:
        return _operations_of_function(op)
    return 0.0


def is_product(op: tf.Operation) -> bool:
    """Returns whether an op is a matrix product or a convolution itself.

    Args:
        op: of a graph.

    Returns:
        False for functions that have one inside.
    """
    return op.type not in _CALLS and operations(op) > 0


def _operations_of_function(op: tf.Operation) -> float:
    """Those of the function that an op calls; of one turn, where it is a loop's body."""
    attribute = "body" if "While" in op.type else "f"
    graph = _internal.graph_of_function(op.graph, op.get_attr(attribute).name)
    return sum(
        operations(inner) + PER_ELEMENT * sum(map(elements, inner.outputs))
        for inner in graph.get_operations()
    )
