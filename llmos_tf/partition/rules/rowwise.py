"""Rules of ops that treat each row, or each matrix, by itself."""

from collections.abc import Sequence

import tensorflow as tf

from llmos_tf.partition.graph.choice import (
    Choice,
    Emit,
    Rule,
    can_shard,
    first_sharded,
    reduced,
    same,
)
from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Placement, Sharded

# How many of the last dimensions of the first input an op works along.
_TRAILING = {
    "AdjustContrastv2": 3,
    "AdjustHue": 1,
    "AdjustSaturation": 1,
    "Cholesky": 2,
    "CholeskyGrad": 2,
    "FFT": 1,
    "FFT2D": 2,
    "FFT3D": 3,
    "HSVToRGB": 1,
    "IFFT": 1,
    "IFFT2D": 2,
    "IFFT3D": 3,
    "IRFFT": 1,
    "IRFFT2D": 2,
    "IRFFT3D": 3,
    "LRN": 1,
    "LRNGrad": 1,
    "LogSoftmax": 1,
    "MatrixBandPart": 2,
    "MatrixDeterminant": 2,
    "MatrixDiag": 1,
    "MatrixDiagPart": 2,
    "MatrixDiagPartV2": 2,
    "MatrixDiagPartV3": 2,
    "MatrixDiagV2": 1,
    "MatrixDiagV3": 1,
    "MatrixInverse": 2,
    "MatrixSetDiag": 2,
    "MatrixSetDiagV2": 2,
    "MatrixSetDiagV3": 2,
    "MatrixSolve": 2,
    "MatrixTriangularSolve": 2,
    "Qr": 2,
    "RFFT": 1,
    "RGBToHSV": 1,
    "RFFT2D": 2,
    "RFFT3D": 3,
    "SelfAdjointEigV2": 2,
    "Softmax": 1,
    "Svd": 2,
    "TopKV2": 1,
}
# Inputs that have rows, or one for all rows, of ops that keep dimension 0 apart.
_WITH_ROWS = {
    "AvgPool": (0,),
    "AvgPool3D": (0,),
    "CombinedNonMaxSuppression": (0, 1),
    "Conv2D": (0,),
    "Conv3D": (0,),
    "DepthToSpace": (0,),
    "DepthwiseConv2dNative": (0,),
    "Dilation2D": (0,),
    "ExtractImagePatches": (0,),
    "ImageProjectiveTransformV2": (0, 1),
    "ImageProjectiveTransformV3": (0, 1),
    "InTopK": (0, 1),
    "InTopKV2": (0, 1),
    "MaxPool": (0,),
    "MaxPool3D": (0,),
    "MaxPool3DGrad": (0, 1, 2),
    "MaxPoolGrad": (0, 1, 2),
    "MaxPoolV2": (0,),
    "ResizeArea": (0,),
    "ResizeBicubic": (0,),
    "ResizeBicubicGrad": (0, 1),
    "ResizeBilinear": (0,),
    "ResizeBilinearGrad": (0, 1),
    "ResizeNearestNeighbor": (0,),
    "ResizeNearestNeighborGrad": (0,),
    "SoftmaxCrossEntropyWithLogits": (0, 1),
    "SpaceToDepth": (0,),
    "SparseSoftmaxCrossEntropyWithLogits": (0, 1),
}
# Kernels that are not made for no rows: those of Fourier transforms end the process.
_NEEDS_A_ROW = ("Conv", "Pool", "Depthwise", "Dilation", "Resize", "FFT")


def trailing(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Keeps what is sharded along a dimension that the op does not work along."""
    placements = [reduced(p) for p in inputs]
    first = first_sharded(placements)
    ranks = [value.rank for value in node.inputs]
    if first is None or None in ranks:
        return None
    dim, rank = placements[first].dim, ranks[0]
    places = [dim] * len(ranks)
    if node.type == "MatrixTriangularSolve":
        # Leading dimensions are broadcast.
        rank = ranks[first]
        places = [dim - rank + other for other in ranks]
        if rank < max(ranks):
            return None
    if dim >= rank - _TRAILING[node.type]:
        return None
    needed = [
        Sharded(place) if i == first or can_shard(value, place) else REPLICATED
        for i, (value, place) in enumerate(zip(node.inputs, places, strict=True))
    ]
    outputs = [_trailing_output(value, dim) for value in node.outputs]
    if None in outputs:
        return None
    emit = _emit_with_a_row(node, [i for i, p in enumerate(needed) if p != REPLICATED], dim)
    return Choice(tuple(needed), tuple(outputs), emit)


def _trailing_output(value: Value, dim: int) -> Placement | None:
    """The placement of an output; None where it cannot be sharded."""
    if can_shard(value, dim):
        return Sharded(dim)
    # What an op is not asked for, such as singular vectors, it returns empty.
    is_empty = value.dims is not None and any(d is not None and d.length == 0 for d in value.dims)
    return REPLICATED if is_empty else None


def arg_extremum(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Finds the place of the largest or smallest entry along another dimension."""
    axis, placement, rank = node.inputs[1].constant, reduced(inputs[0]), node.inputs[0].rank
    if axis is None or rank is None or not isinstance(placement, Sharded):
        return None
    along = int(axis) % rank
    if along == placement.dim:
        return None
    return same(node, [placement, REPLICATED], Sharded(placement.dim - (placement.dim > along)))


def by_rows(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Keeps what is sharded along dimension 0."""
    listed = _WITH_ROWS[node.type]
    rows = [i for i in listed if can_shard(node.inputs[i], 0)]
    if not any(isinstance(inputs[i], Sharded) for i in rows):
        return None
    if not all(i in rows or _is_one_row(node.inputs[i]) for i in listed):
        return None
    if not all(can_shard(value, 0) for value in node.outputs):
        return None
    needed = [Sharded(0) if i in rows else REPLICATED for i in range(len(inputs))]
    return same(node, needed, Sharded(0), _emit_with_a_row(node, rows))


def _is_one_row(value: Value) -> bool:
    return bool(value.dims) and value.dims[0] is not None and value.dims[0].length == 1


def _emit_with_a_row(node: Node, rows: Sequence[int], dim: int = 0) -> Emit | None:
    """What runs a kernel that needs a row on zeros, where a rank has none."""
    if not any(kind in node.type for kind in _NEEDS_A_ROW):
        return None

    def emit(emission, node, inputs):
        padded = [emission.with_a_row(x, dim) if i in rows else x for i, x in enumerate(inputs)]
        return [emission.without_it(y, inputs[rows[0]], dim) for y in emission.copy(node, padded)]

    return emit


def gradient_of_input(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """The gradient of what a convolution or an average was taken of, whose shape is given."""
    last = len(inputs) - 1
    if not isinstance(inputs[last], Sharded) or not can_shard(node.outputs[0], 0):
        return None

    def emit(emission, node, inputs):
        inputs = list(inputs)
        gradient = inputs[last]
        padded = emission.with_a_row(gradient)
        inputs[0] = emission.with_entry(inputs[0], 0, tf.shape(padded)[0])
        inputs[last] = padded
        return [emission.without_it(y, gradient) for y in emission.copy(node, inputs)]

    needed = [REPLICATED] * len(inputs)
    needed[last] = Sharded(0)
    return same(node, needed, Sharded(0), emit)


def gradient_of_filter(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """The gradient of a convolution's weights: ranks have that of their rows."""
    if not (isinstance(inputs[0], Sharded) or isinstance(inputs[2], Sharded)):
        return None
    if not (can_shard(node.inputs[0], 0) and can_shard(node.inputs[2], 0)):
        return None

    def emit(emission, node, inputs):
        x, sizes, gradient = inputs
        return emission.copy(node, [emission.with_a_row(x), sizes, emission.with_a_row(gradient)])

    return same(node, [Sharded(0), REPLICATED, Sharded(0)], PARTIAL, emit)


def reverse_sequence(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Reverses each row by its length."""
    dim = node.int_attr("batch_dim")
    if Sharded(dim) not in inputs[:1] and Sharded(0) not in inputs[1:]:
        return None
    if not can_shard(node.inputs[0], dim) or not can_shard(node.inputs[1], 0):
        return None
    return same(node, [Sharded(dim), Sharded(0)], Sharded(dim))


def crop_and_resize(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Crops boxes of the images that they name."""
    if not any(can_shard(value, 0) for value in node.inputs[1:3]):
        return None
    if not all(can_shard(value, 0) for value in (*node.inputs[1:3], *node.outputs)):
        return None
    needed = [REPLICATED, Sharded(0), Sharded(0), REPLICATED]
    return same(node, needed, Sharded(0), _emit_with_a_row(node, (1, 2)))


def batch_norm(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Normalizes by statistics that are given, in inference."""
    if node.bool_attr("is_training") or inputs[0] != Sharded(0):
        return None
    others = [REPLICATED] * (len(node.outputs) - 1)
    needed = (Sharded(0), *[REPLICATED] * (len(inputs) - 1))
    return Choice(needed, (Sharded(0), *others), _with_a_row_first)


def _with_a_row_first(emission, node: Node, inputs: list) -> list:
    """Runs a kernel, of which only the first output has rows, on one row at least."""
    x, *others = inputs
    y, *statistics = emission.copy(node, [emission.with_a_row(x), *others])
    return [emission.without_it(y, x), *statistics]


_INPUT_GRADIENTS = (
    "AvgPool3DGrad",
    "AvgPoolGrad",
    "Conv2DBackpropInput",
    "Conv3DBackpropInputV2",
    "DepthwiseConv2dNativeBackpropInput",
)
_FILTER_GRADIENTS = (
    "Conv2DBackpropFilter",
    "Conv3DBackpropFilterV2",
    "DepthwiseConv2dNativeBackpropFilter",
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_TRAILING, trailing),
    **dict.fromkeys(_WITH_ROWS, by_rows),
    **dict.fromkeys(_INPUT_GRADIENTS, gradient_of_input),
    **dict.fromkeys(_FILTER_GRADIENTS, gradient_of_filter),
    "ArgMax": arg_extremum,
    "ArgMin": arg_extremum,
    "CropAndResize": crop_and_resize,
    "FusedBatchNorm": batch_norm,
    "FusedBatchNormV2": batch_norm,
    "FusedBatchNormV3": batch_norm,
    "ReverseSequence": reverse_sequence,
}
