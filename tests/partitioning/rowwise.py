"""Cases of the rules of `llmos_tf.partition.rules.rowwise`."""

import numpy as np
import tensorflow as tf

from partitioning.cases import Input, N, case, raw

_S = ("S",)
_ZERO = np.float64(0)
_ONES = np.ones(3, np.float32)
_LENGTHS = Input((N,), "index")


def _gradients(op, fn, *inputs, of=None, **options):
    """The gradients of a function, with an upstream gradient of what it returns."""

    def gradients(*x):
        y = fn(*x)
        return tf.gradients(y, x if of is None else [x[of]], tf.cos(y))

    return case(op, gradients, *inputs, **options)


def _trailing(op, fn, last, kind="normal"):
    yield case(op, fn, Input((N, *last), kind))
    yield case(op, fn, Input((2, N, *last), kind))
    # A transform back of one number is of none, which ends the process.
    if len(last) == 1 and op != "IRFFT":
        yield case(op, fn, Input((2, N), kind), whole=_S)


_FFTS = (
    ("FFT", tf.signal.fft, (4,)),
    ("IFFT", tf.signal.ifft, (4,)),
    ("FFT2D", tf.signal.fft2d, (2, 4)),
    ("IFFT2D", tf.signal.ifft2d, (2, 4)),
    ("FFT3D", tf.signal.fft3d, (2, 2, 4)),
    ("IFFT3D", tf.signal.ifft3d, (2, 2, 4)),
    ("IRFFT", tf.signal.irfft, (3,)),
    ("IRFFT3D", tf.signal.irfft3d, (2, 2, 3)),
    ("IRFFT2D", tf.signal.irfft2d, (2, 3)),
)
_IMAGE = (N, 4, 6, 3)


def _conv(x, w):
    return tf.nn.conv2d(x, w, 2, "SAME")


def _conv3d(x, w):
    return tf.nn.conv3d(x, w, [1, 1, 2, 1, 1], "SAME")


def _depthwise(x, w):
    return tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "VALID")


def _max_pool(x):
    return tf.nn.max_pool2d(x, 2, 2, "VALID")


def _average(x):
    return tf.nn.avg_pool2d(x, 2, 2, "SAME")


CASES = [
    *_trailing("Softmax", tf.nn.softmax, (3,)),
    *_trailing("LogSoftmax", tf.nn.log_softmax, (3,)),
    *_trailing("TopKV2", lambda x: tf.math.top_k(x, 1), (3,)),
    *_trailing("MatrixBandPart", lambda x: tf.linalg.band_part(x, 1, 0), (3, 3)),
    *_trailing("MatrixDiagV3", tf.linalg.diag, (3,)),
    *_trailing("MatrixDiagPartV3", tf.linalg.diag_part, (3, 3)),
    *_trailing("MatrixDiagV2", lambda x: raw("MatrixDiagV2")(x, 0, -1, -1, _ZERO), (3,)),
    *_trailing("MatrixDiagPartV2", lambda x: raw("MatrixDiagPartV2")(x, 0, _ZERO), (3, 3)),
    *_trailing("MatrixDiag", raw("MatrixDiag"), (3,)),
    *_trailing("MatrixDiagPart", raw("MatrixDiagPart"), (3, 3)),
    *_trailing("MatrixInverse", tf.linalg.inv, (3, 3), "spd"),
    *_trailing("MatrixDeterminant", tf.linalg.det, (3, 3), "spd"),
    *_trailing("Cholesky", tf.linalg.cholesky, (3, 3), "spd"),
    *_trailing("SelfAdjointEigV2", lambda x: tf.linalg.eigvalsh(x), (3, 3), "spd"),
    *_trailing("Svd", lambda x: tf.linalg.svd(x, compute_uv=False), (3, 2)),
    *_trailing("Qr", tf.linalg.qr, (3, 2)),
    *(one for op, fn, last in _FFTS for one in _trailing(op, fn, last, "complex")),
    *_trailing("RFFT", tf.signal.rfft, (4,)),
    *_trailing("RFFT3D", tf.signal.rfft3d, (2, 2, 4)),
    *_trailing("RFFT2D", tf.signal.rfft2d, (2, 4)),
    case("RGBToHSV", raw("RGBToHSV"), Input((N, 2, 3), "unit")),
    case("HSVToRGB", raw("HSVToRGB"), Input((2, N, 3), "unit")),
    case("AdjustHue", raw("AdjustHue"), Input((N, 2, 2, 3), "float32"), Input((), "float32")),
    case(
        "AdjustSaturation",
        raw("AdjustSaturation"),
        Input((N, 2, 2, 3), "float32"),
        Input((), "float32"),
    ),
    case(
        "AdjustContrastv2",
        raw("AdjustContrastv2"),
        Input((N, 2, 2, 3), "float32"),
        Input((), "float32"),
    ),
    case("LRN", raw("LRN"), Input((N, 2, 2, 3), "float32")),
    _gradients("LRNGrad", lambda x: raw("LRN")(x), Input((N, 2, 2, 3), "float32")),
    case("MatrixSetDiag", raw("MatrixSetDiag"), (N, 3, 3), (N, 3)),
    case("MatrixSetDiagV2", lambda x, y: raw("MatrixSetDiagV2")(x, y, 0), (N, 3, 3), (N, 3)),
    case("MatrixSetDiagV3", tf.linalg.set_diag, (2, N, 3, 3), (2, N, 3)),
    case("ReverseSequence", lambda x, n: tf.reverse_sequence(x, n, 1), (N, 4), _LENGTHS),
    case("ReverseSequence", lambda x, n: tf.reverse_sequence(x, n, 0, 1), (4, N), _LENGTHS),
    case(
        "CropAndResize",
        lambda x, i: tf.image.crop_and_resize(
            x, tf.tile([[0.0, 0.0, 1.0, 0.5]], [tf.shape(i)[0], 1]), i % tf.shape(x)[0], [2, 2]
        ),
        Input(_IMAGE, "float32"),
        _LENGTHS,
    ),
    case(
        "CombinedNonMaxSuppression",
        lambda x, y: tf.image.combined_non_max_suppression(x, y, 3, 3),
        Input((N, 5, 1, 4), "float32"),
        Input((N, 5, 2), "float32"),
    ),
    *(
        case(
            op,
            lambda x, op=op: raw(op, is_training=False)(x, _ONES, _ONES, _ONES, _ONES)[0],
            Input(_IMAGE, "float32"),
        )
        for op in ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
    ),
    case("MatrixSolve", raw("MatrixSolve"), Input((N, 3, 3), "spd"), (N, 3, 2)),
    case(
        "MatrixTriangularSolve",
        raw("MatrixTriangularSolve"),
        Input((N, 3, 3), "triangular"),
        (N, 3, 2),
    ),
    case(
        "MatrixTriangularSolve",
        raw("MatrixTriangularSolve"),
        Input((3, 3), "triangular"),
        (N, 3, 2),
    ),
    case("CholeskyGrad", raw("CholeskyGrad"), Input((N, 3, 3), "triangular"), (N, 3, 3)),
    case("ArgMax", lambda x: tf.argmax(x, 1), (N, 3)),
    case("ArgMax", lambda x: tf.argmax(x, -1), (N, 2, 3)),
    case("ArgMin", lambda x: tf.argmin(x, 0), (3, N)),
    case("ArgMax", lambda x: tf.argmax(x, 0), (N, 3), whole=_S),
    # Convolutions and pools.
    case("Conv2D", _conv, _IMAGE, (2, 2, 3, 2)),
    _gradients("Conv2DBackpropInput", _conv, _IMAGE, (2, 2, 3, 2), of=0),
    _gradients("Conv2DBackpropFilter", _conv, _IMAGE, (2, 2, 3, 2), of=1),
    case(
        "Conv2DBackpropInput",
        lambda x, w: tf.nn.conv2d_transpose(x, w, [tf.shape(x)[0], 8, 12, 2], 2),
        _IMAGE,
        (2, 2, 2, 3),
    ),
    case("Conv3D", _conv3d, (N, 2, 4, 3, 2), (1, 2, 2, 2, 3)),
    _gradients("Conv3DBackpropInputV2", _conv3d, (N, 2, 4, 3, 2), (1, 2, 2, 2, 3), of=0),
    _gradients("Conv3DBackpropFilterV2", _conv3d, (N, 2, 4, 3, 2), (1, 2, 2, 2, 3), of=1),
    case("DepthwiseConv2dNative", _depthwise, _IMAGE, (2, 2, 3, 1)),
    _gradients("DepthwiseConv2dNativeBackpropInput", _depthwise, _IMAGE, (2, 2, 3, 1), of=0),
    _gradients("DepthwiseConv2dNativeBackpropFilter", _depthwise, _IMAGE, (2, 2, 3, 1), of=1),
    case("MaxPool", _max_pool, _IMAGE),
    _gradients("MaxPoolGrad", _max_pool, _IMAGE),
    case(
        "MaxPoolV2",
        lambda x: raw("MaxPoolV2", padding="VALID")(
            x, tf.constant([1, 2, 2, 1]), tf.constant([1, 2, 2, 1])
        ),
        _IMAGE,
    ),
    case(
        "MaxPool3D", lambda x: tf.nn.max_pool3d(x, 2, 1, "SAME"), Input((N, 2, 4, 3, 2), "float32")
    ),
    _gradients(
        "MaxPool3DGrad",
        lambda x: tf.nn.max_pool3d(x, 2, 1, "SAME"),
        Input((N, 2, 4, 3, 2), "float32"),
    ),
    case("AvgPool", _average, _IMAGE),
    _gradients("AvgPoolGrad", _average, _IMAGE),
    case(
        "AvgPool3D", lambda x: tf.nn.avg_pool3d(x, 2, 1, "SAME"), Input((N, 2, 4, 3, 2), "float32")
    ),
    _gradients(
        "AvgPool3DGrad",
        lambda x: tf.nn.avg_pool3d(x, 2, 1, "SAME"),
        Input((N, 2, 4, 3, 2), "float32"),
    ),
    case(
        "Dilation2D",
        lambda x, w: tf.nn.dilation2d(x, w, [1, 1, 1, 1], "SAME", "NHWC", [1, 1, 1, 1]),
        _IMAGE,
        (2, 2, 3),
    ),
    case(
        "ExtractImagePatches",
        lambda x: tf.image.extract_patches(x, [1, 2, 2, 1], [1, 2, 2, 1], [1, 1, 1, 1], "VALID"),
        _IMAGE,
    ),
    case("DepthToSpace", lambda x: tf.nn.depth_to_space(x, 2), (N, 2, 3, 4)),
    case("SpaceToDepth", lambda x: tf.nn.space_to_depth(x, 2), (N, 2, 4, 3)),
    *(
        case(op, raw(op, half_pixel_centers=True), _IMAGE, Input((2,), "int"), placements=["SR"])
        for op in ("ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor")
    ),
    case("ResizeArea", raw("ResizeArea"), _IMAGE, Input((2,), "int"), placements=["SR"]),
    *(
        _gradients(
            f"{op}Grad",
            lambda x, s, op=op: raw(op, half_pixel_centers=True)(x, s),
            Input(_IMAGE, "float32"),
            Input((2,), "int"),
            of=0,
            placements=["SR"],
        )
        for op in ("ResizeBicubic", "ResizeBilinear", "ResizeNearestNeighbor")
    ),
    case(
        "ImageProjectiveTransformV3",
        lambda x, t: tf.raw_ops.ImageProjectiveTransformV3(
            images=x, transforms=t, output_shape=[4, 6], interpolation="BILINEAR", fill_value=0.0
        ),
        Input(_IMAGE, "float32"),
        Input((1, 8), "float32"),
    ),
    case(
        "ImageProjectiveTransformV3",
        lambda x, t: tf.raw_ops.ImageProjectiveTransformV3(
            images=x, transforms=t, output_shape=[4, 6], interpolation="NEAREST", fill_value=0.0
        ),
        Input(_IMAGE, "float32"),
        Input((N, 8), "float32"),
    ),
    case(
        "ImageProjectiveTransformV2",
        lambda x, t: tf.raw_ops.ImageProjectiveTransformV2(
            images=x, transforms=t, output_shape=[4, 6], interpolation="BILINEAR"
        ),
        Input(_IMAGE, "float32"),
        Input((N, 8), "float32"),
    ),
    # Losses and ranks.
    case("SoftmaxCrossEntropyWithLogits", raw("SoftmaxCrossEntropyWithLogits"), (N, 3), (N, 3)),
    case(
        "SparseSoftmaxCrossEntropyWithLogits",
        raw("SparseSoftmaxCrossEntropyWithLogits"),
        (N, 3),
        Input((N,), "index"),
    ),
    case(
        "InTopKV2",
        raw("InTopKV2"),
        Input((N, 3), "float32"),
        Input((N,), "index"),
        Input((), "index"),
    ),
    case("InTopK", raw("InTopK", k=2), Input((N, 3), "float32"), Input((N,), "index")),
]
