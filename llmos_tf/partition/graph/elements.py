"""Elements of tensor lists: their shapes, from where they are stored to where they are read.

`tf.TensorArray`, gradients of loops and gradients of conditions keep values in tensors of type
variant, of which TensorFlow's shape inference knows little, and nothing across functions.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.partition.graph.known import (
    NO_SHAPES,
    NUM_INFERENCES,
    Elements,
    Shapes,
    constants_of,
    joined_elements,
)

# Ops of which an output may be a known value.
VALUES = ("OptionalGetValue", "TensorListElementShape", "TensorListGetItem", "TensorListPopBack")
# Ops that read elements, and which of their outputs has the shape of them.
READS = {
    "OptionalGetValue": 0,
    "TensorListConcat": 0,
    "TensorListConcatV2": 0,
    "TensorListGather": 0,
    "TensorListGetItem": 0,
    "TensorListPopBack": 1,
    "TensorListStack": 0,
}
_UNKNOWN = Elements(NO_SHAPES)
_NO_LENGTHS = (None,) * NUM_INFERENCES

# The tensors of an output by its name, and the elements of one.
_Tensors = Callable[[str], tuple[tf.Tensor, ...]]
_ElementsOf = Callable[[str], Elements]


def of_output(node: Any, index: int, tensors: _Tensors, elements: _ElementsOf) -> Elements:
    """Returns what is known of the elements of an output.

    Args:
        node: the `NodeDef` that makes it.
        index: of the output.
        tensors: of a name, the tensors of all inferences.
        elements: of a name, its elements.

    Returns:
        What is known.
    """
    inputs = node.input
    dtype = _element_type(node)
    if node.op in ("TensorListReserve", "EmptyTensorList"):
        reserves = node.op == "TensorListReserve"
        return Elements(None, _lengths(tensors(inputs[1])) if reserves else _NO_LENGTHS, dtype)
    if node.op == "OptionalNone":
        return Elements(None)
    if node.op in ("TensorListFromTensor", "TensorListSplit"):
        shapes = [x.shape for x in tensors(inputs[0])]
        lengths = tuple(shape[0] if shape.rank else None for shape in shapes)
        if node.op == "TensorListSplit":
            rows = tuple(tf.TensorShape([None]).concatenate(shape[1:]) for shape in shapes)
            return Elements(rows, _NO_LENGTHS, dtype)
        return Elements(tuple(shape[1:] for shape in shapes), lengths, dtype)
    if node.op in ("TensorListScatter", "TensorListScatterV2"):
        return Elements(tuple(x.shape[1:] for x in tensors(inputs[0])), _NO_LENGTHS, dtype)
    if node.op == "TensorListScatterIntoExistingList":
        stored = Elements(tuple(x.shape[1:] for x in tensors(inputs[1])), dtype=dtype)
        return joined_elements([elements(inputs[0]), stored])
    if node.op in ("TensorListSetItem", "TensorListPushBack"):
        before = elements(inputs[0])
        item = _of_item(inputs[-1], tensors, elements)
        grows = node.op == "TensorListPushBack" or node.attr["resize_if_index_out_of_bounds"].b
        lengths = _NO_LENGTHS if grows else before.lengths
        after = joined_elements([before, item])
        return Elements(after.shapes, lengths, after.dtype, after.constants)
    if node.op in ("TensorListPopBack", "TensorListResize"):
        before = elements(inputs[0])
        return Elements(before.shapes, _NO_LENGTHS, before.dtype, before.constants)
    if node.op in ("Identity", "IdentityN", "ZerosLike", "StopGradient", "PreventGradient"):
        return elements(inputs[index])
    if node.op in ("Add", "AddN", "AddV2", "TensorListConcatLists"):
        found = joined_elements([elements(name) for name in inputs])
        return found if node.op != "TensorListConcatLists" else Elements(found.shapes, dtype=dtype)
    if node.op == "OptionalFromValue" and len(inputs) == 1:
        return _of_item(inputs[0], tensors, elements)
    if node.op in READS and index == READS[node.op]:
        return elements(inputs[0])
    return _UNKNOWN


def value(node: Any, elements: _ElementsOf) -> tuple[int, tuple[Any, ...] | None]:
    """Returns which output of one of `VALUES` may be known, and its value in each inference.

    Args:
        node: the `NodeDef`.
        elements: as in `of_output`.

    Returns:
        The index of the output, and integers or tuples of them; None where it is not known.
    """
    found = elements(node.input[0])
    if node.op != "TensorListElementShape":
        return READS[node.op], found.constants
    if found.shapes is None or not all(shape.is_fully_defined() for shape in found.shapes):
        return 0, None
    return 0, tuple(tuple(shape.as_list()) for shape in found.shapes)


def read_shapes(node: Any, tensors: _Tensors, elements: _ElementsOf) -> dict[int, Shapes]:
    """Returns the shapes of what is read of a list.

    Args:
        node: the `NodeDef` of one of `READS`.
        tensors: as in `of_output`.
        elements: as there.

    Returns:
        For an output, a shape for each inference.
    """
    if node.op not in READS:
        return {}
    return {READS[node.op]: _read_shapes(node, tensors, elements)}


def _read_shapes(node: Any, tensors: _Tensors, elements: _ElementsOf) -> Shapes:
    output = tensors(f"{node.name}:{READS[node.op]}")
    found = elements(node.input[0])
    if found.shapes is None or output[0].dtype == tf.variant:
        return NO_SHAPES
    if node.op == "TensorListStack":
        return tuple(
            tf.TensorShape([length]).concatenate(shape)
            for length, shape in zip(found.lengths, found.shapes, strict=True)
        )
    if node.op == "TensorListGather":
        counts = [x.shape[0] if x.shape.rank else None for x in tensors(node.input[1])]
        return tuple(
            tf.TensorShape([count]).concatenate(shape)
            for count, shape in zip(counts, found.shapes, strict=True)
        )
    if node.op.startswith("TensorListConcat"):
        return tuple(
            tf.TensorShape([None]).concatenate(shape[1:]) if shape.rank else tf.TensorShape(None)
            for shape in found.shapes
        )
    return found.shapes


def _of_item(name: str, tensors: _Tensors, elements: _ElementsOf) -> Elements:
    """What is known of a list with one element."""
    item = tensors(name)
    if item[0].dtype == tf.variant:
        inner = elements(name)
        return Elements(inner.shapes, dtype=tf.variant, constants=inner.constants)
    shapes = tuple(x.shape for x in item)
    return Elements(shapes, dtype=item[0].dtype, constants=constants_of(item))


def _element_type(node: Any) -> tf.DType | None:
    return tf.as_dtype(node.attr["element_dtype"].type) if "element_dtype" in node.attr else None


def _lengths(tensors: tuple[tf.Tensor, ...]) -> tuple[int | None, ...]:
    values = [_internal.evaluated_constant(x) for x in tensors]
    return tuple(None if value is None else int(value) for value in values)
