"""How large the outputs of ops are, and whose memory they are."""

import math
from collections.abc import Sequence

import tensorflow as tf

# Ops whose first output is the memory of their first input.
SAME_MEMORY = frozenset(
    [
        "Identity",
        "Reshape",
        "StopGradient",
        "PreventGradient",
        "ExpandDims",
        "Squeeze",
        "EnsureShape",
        "Bitcast",
        "Snapshot",
        "PlaceholderWithDefault",
        "CheckNumerics",
    ]
)
# Ops whose outputs are slices of an input, at this place.
_SLICES = {"Split": 1, "SplitV": 0, "Unpack": 0, "Slice": 0, "StridedSlice": 0}
# TensorFlow's kernels take slices that begin at multiples of so many bytes.
_ALIGNMENT = 64
# Ops whose result is as long as their input at most.
_SELECTS = ("Where", "Unique", "UniqueV2", "DynamicPartition")
# Products of matrices, and the attributes that transpose either.
_PRODUCTS = {
    "MatMul": ("transpose_a", "transpose_b"),
    "BatchMatMul": ("adj_x", "adj_y"),
    "BatchMatMulV2": ("adj_x", "adj_y"),
}
# What is no array of numbers.
NO_BYTES = (tf.resource, tf.variant, tf.string)


def bytes_of(x: tf.Tensor) -> int:
    """Returns the bytes of a tensor, of which unknown dimensions count as 1.

    Args:
        x: of a graph.

    Returns:
        Bytes; 0 of what is no array of numbers.
    """
    if x.dtype in NO_BYTES or x.shape.rank is None:
        return 0
    return math.prod(size or (1 if size is None else 0) for size in x.shape) * x.dtype.size


def output_bytes(op: tf.Operation, x: tf.Tensor, sizes: Sequence[int]) -> int:
    """Returns the bytes of an output. Where its length follows from values, it is an input's.

    Args:
        op: of a graph.
        x: its output.
        sizes: of its inputs, in bytes.

    Returns:
        Bytes; 0 of what is no array of numbers.
    """
    if x.dtype in NO_BYTES or x.shape.is_fully_defined() or x.shape.rank is None:
        return bytes_of(x)
    if op.type == "Reshape":
        return sizes[0]
    if op.type in ("ConcatV2", "Pack"):
        return sum(sizes)
    if "Split" in op.type or op.type == "Unpack":
        # Into parts that are taken to be equal.
        return max(sizes) // len(op.outputs)
    if op.type == "Slice" and op.inputs[1].op.type == "ConcatOffset":
        # The gradient of what was laid end to end.
        return sizes[0] // len(op.inputs[1].op.outputs)
    if op.type in _PRODUCTS:
        of_product = _size_of_product(op, sizes)
        if of_product is not None:
            return of_product
    if op.type in _SELECTS:
        return bytes_of(x) * max((y.shape.num_elements() or 1 for y in op.inputs), default=1)
    unknown = _num_unknown(x)
    lengths = [
        size // bytes_of(y)
        for y, size in zip(op.inputs, sizes, strict=True)
        if bytes_of(y) and _num_unknown(y) == unknown
    ]
    if lengths:
        return bytes_of(x) * max(lengths)
    # As when rows are laid in another order, or each rank sends some of them.
    alike = (s for y, s in zip(op.inputs, sizes, strict=True) if y.dtype == x.dtype)
    return max([bytes_of(x), *alike])


def shared_inputs(op: tf.Operation) -> list[int | None]:
    """Returns for each output of an op the place of the input whose memory it is, or None.

    Args:
        op: of a graph.

    Returns:
        Places of inputs.
    """
    places: list[int | None] = [None] * len(op.outputs)
    if op.type in SAME_MEMORY:
        places[0] = 0
    elif op.type == "IdentityN":
        return list(range(len(op.inputs)))
    elif op.type in _SLICES and _slices_rows(op):
        return [_SLICES[op.type]] * len(op.outputs)
    return places


def _slices_rows(op: tf.Operation) -> bool:
    """Whether an op takes rows along dimension 0, which lie one after the other in its input."""
    x = op.inputs[_SLICES[op.type]]
    if x.shape.rank is None or None in x.shape[1:] or x.shape.rank == 0:
        return False
    if math.prod(x.shape[1:]) * x.dtype.size % _ALIGNMENT:
        return False
    if op.type == "Unpack":
        return op.get_attr("axis") == 0
    if op.type in ("Split", "SplitV"):
        return tf.get_static_value(op.inputs[0 if op.type == "Split" else 2]) == 0
    (y,) = op.outputs
    if op.type == "StridedSlice":
        strides = tf.get_static_value(op.inputs[3])
        masks = op.get_attr("ellipsis_mask"), op.get_attr("new_axis_mask")
        if strides is None or any(strides != 1) or any(masks):
            return False
        # A single index takes dimension 0 away.
        inner = y.shape if op.get_attr("shrink_axis_mask") == 1 else y.shape[1:]
        return y.shape.rank is not None and inner == x.shape[1:]
    return y.shape.rank is not None and y.shape[1:] == x.shape[1:]


def _size_of_product(op: tf.Operation, sizes: list[int]) -> int | None:
    """Bytes of a product, if one of its factors is a matrix of known shape, or None."""
    matrices = []
    for x, attribute in zip(op.inputs, _PRODUCTS[op.type], strict=True):
        rows, columns = (None, None) if x.shape.rank is None else x.shape[-2:]
        matrices.append((columns, rows) if op.get_attr(attribute) else (rows, columns))
    (rows, left), (right, columns) = matrices
    if right and columns:
        return sizes[0] // right * columns
    return sizes[1] // left * rows if rows and left else None


def _num_unknown(x: tf.Tensor) -> int:
    return 0 if x.shape.rank is None else list(x.shape).count(None)
