"""Cases of the rules of `llmos_tf.partition.rules.movement`."""

import tensorflow as tf

from partitioning.cases import Input, N, case


def _rows_of(x):
    return tf.shape(x)[0]


_RESHAPES = (
    ((N, 3, 4), lambda x: tf.reshape(x, [-1, 12])),
    ((N, 3, 4), lambda x: tf.reshape(x, [-1, 4])),
    ((N, 3, 4), lambda x: tf.reshape(x, [-1])),
    ((N, 3, 4), lambda x: tf.reshape(x, [_rows_of(x), 2, 6])),
    ((N, 3, 4), lambda x: tf.reshape(x, [_rows_of(x) * 3, 2, 2])),
    ((N, 6), lambda x: tf.reshape(tf.reshape(x, [-1, 2]), [-1, 3, 2])),
    ((N,), lambda x: tf.reshape(x, [-1, 1])),
    ((N,), lambda x: tf.reshape(x, [1, -1, 1])),
    ((2, N, 4), lambda x: tf.reshape(x, [2, -1])),
    ((2, N, 4), lambda x: tf.reshape(x, [2, -1, 2, 2])),
    ((1, N, 4), lambda x: tf.reshape(x, [-1, 4])),
)

_SLICES = (
    ((N, 3, 4), lambda x: x[:, 1]),
    ((N, 3, 4), lambda x: x[..., 1]),
    ((N, 3, 4), lambda x: x[:, :2, ::2]),
    ((N, 3, 4), lambda x: x[:, tf.newaxis, ..., -1]),
    ((N, 3, 4), lambda x: x[tf.newaxis]),
    ((3, N, 4), lambda x: x[0]),
    ((3, N, 4), lambda x: x[1:, :, -1]),
    ((3, 4, N), lambda x: x[0, 1:]),
    ((3, 4, N), lambda x: x[1, ..., tf.newaxis]),
    ((N, 4), lambda x: x[:, ::-1]),
)
# Of rows, a rank does not know which are its own: they are computed whole.
_ROW_SLICES = (
    ((N, 3), lambda x: x[1:]),
    ((N, 3), lambda x: x[0]),
    ((N, 3), lambda x: x[::-1]),
    ((N, 3), lambda x: x[: _rows_of(x) // 2]),
    ((3, N), lambda x: x[:, :1]),
)


def _slice_grads():
    for shape, fn in _SLICES + _ROW_SLICES:
        whole = () if (shape, fn) in _SLICES else ("S",)

        def gradient(x, fn=fn):
            return tf.gradients(tf.square(fn(x)), x)

        yield case("StridedSliceGrad", gradient, shape, placements=["S"], whole=whole)


CASES = [
    *(case("Reshape", fn, shape) for shape, fn in _RESHAPES),
    *(case("StridedSlice", fn, shape) for shape, fn in _SLICES),
    *(case("StridedSlice", fn, shape, whole=["S"]) for shape, fn in _ROW_SLICES),
    *_slice_grads(),
    case("Transpose", tf.transpose, (N, 3, 4)),
    case("Transpose", lambda x: tf.transpose(x, [1, 0, 2]), (N, 3, 4)),
    case("Transpose", lambda x: tf.transpose(x, [0, 2, 1]), (3, N, 4)),
    case("Transpose", lambda x: tf.transpose(x, [2, 0, 1]), Input((3, 4, N), "int")),
    case(
        "ConjugateTranspose",
        lambda x: tf.raw_ops.ConjugateTranspose(x=x, perm=[1, 0]),
        Input((N, 3), "complex"),
    ),
    case("ExpandDims", lambda x: x[..., tf.newaxis] + tf.expand_dims(x, -1), (N, 3)),
    case("ExpandDims", lambda x: tf.expand_dims(x, 0), (N, 3)),
    case("ExpandDims", lambda x: tf.expand_dims(x, 1), (N, 3)),
    case("ExpandDims", lambda x: tf.expand_dims(x, 2), (3, N)),
    case("Squeeze", lambda x: tf.squeeze(x, [1]), (N, 1, 3)),
    case("Squeeze", lambda x: tf.squeeze(x, [0, -1]), (1, N, 1)),
    case("ConcatV2", lambda *x: tf.concat(x, 1), (N, 3), (N, 2)),
    case("ConcatV2", lambda *x: tf.concat(x, -1), (2, N, 3), (2, N, 2)),
    case("ConcatV2", lambda *x: tf.concat(x, 0), (2, N), (3, N)),
    case(
        "ConcatV2", lambda *x: tf.concat(x, 0), (N, 3), (N, 3), whole=["SS", "SR", "SP", "RS", "PS"]
    ),
    case("Pack", lambda *x: tf.stack(x), (N, 3), (N, 3)),
    case("Pack", lambda *x: tf.stack(x, 1), (N, 3), (N, 3)),
    case("Pack", lambda *x: tf.stack(x, -1), (3, N), (3, N)),
    case("Unpack", lambda x: tf.unstack(x, axis=1), (N, 3)),
    case("Unpack", lambda x: tf.unstack(x, axis=0), (2, N)),
    case("Unpack", lambda x: tf.unstack(x, axis=-1), (2, N, 3)),
    case("Split", lambda x: tf.split(x, 2, 1), (N, 4)),
    case("Split", lambda x: tf.split(x, 2, 0), (4, N)),
    case("SplitV", lambda x: tf.split(x, [1, 3], -1), (N, 4)),
    case("SplitV", lambda x: tf.split(x, [1, 3], 0), (4, 2, N)),
    case("Slice", lambda x: tf.slice(x, [0, 1], [-1, 2]), (N, 4)),
    case("Slice", lambda x: tf.slice(x, [0, 1], [_rows_of(x), -1]), (N, 4)),
    case("Slice", lambda x: tf.slice(x, [1, 0], [1, -1]), (2, N)),
    case("Slice", lambda x: tf.slice(x, [0, 0], [1, -1]), (N, 4), whole=["S"]),
    case("Pad", lambda x: tf.pad(x, [[0, 0], [1, 2]]), (N, 4)),
    case("Pad", lambda x: tf.pad(x, [[1, 2], [0, 0]]), (4, N)),
    case("Pad", lambda x: tf.pad(x, [[1, 0], [0, 0]]), (N, 4), whole=["S"]),
    case("PadV2", lambda x: tf.pad(x, [[0, 0], [1, 2]], constant_values=2.0), (N, 4)),
    case("PadV2", lambda x: tf.pad(x, [[0, 1], [1, 2]], constant_values=2.0), (N, 4), whole=["S"]),
    case("MirrorPad", lambda x: tf.pad(x, [[0, 0], [1, 2]], "REFLECT"), (N, 4)),
    case("MirrorPad", lambda x: tf.pad(x, [[2, 1], [0, 0]], "SYMMETRIC"), (4, N)),
    case(
        "MirrorPadGrad",
        lambda x: tf.raw_ops.MirrorPadGrad(input=x, paddings=[[0, 0], [1, 2]], mode="REFLECT"),
        (N, 6),
    ),
    case("Tile", lambda x: tf.tile(x, [1, 3]), (N, 2)),
    case("Tile", lambda x: tf.tile(x, [2, 1]), (2, N)),
    case("Tile", lambda x: tf.tile(x, [2, 1]), (N, 2), whole=["S"]),
    case("BroadcastTo", lambda x: tf.broadcast_to(x, [2, _rows_of(x), 3]), (N, 3)),
    case("BroadcastTo", lambda x: tf.broadcast_to(x, [_rows_of(x), 3]), (N, 1)),
    case("BroadcastTo", lambda x: tf.broadcast_to(x, [4, tf.shape(x)[1]]), (1, N)),
    case(
        "BroadcastTo",
        lambda x, y: tf.broadcast_to(x, [_rows_of(y), 3]),
        (3,),
        (N, 2),
        placements=["PR", "PS"],
    ),
    case("Bitcast", lambda x: tf.bitcast(x, tf.int64), (N, 3)),
    case("Bitcast", lambda x: tf.bitcast(x, tf.int32), (3, N)),
    case("Bitcast", lambda x: tf.bitcast(tf.bitcast(x, tf.int32), tf.float64), (N, 3)),
    # Rows that were put together are taken apart for what follows.
    case(
        "ConcatV2",
        lambda x: tf.tanh(tf.matmul(tf.concat([x, x], 0), x, transpose_b=True)),
        (N, 3),
        placements=["S"],
        whole=["S"],
    ),
    case("Cumsum", lambda x: tf.cumsum(x, 1), (N, 3)),
    case("Cumsum", lambda x: tf.cumsum(x, 0, exclusive=True), (3, N)),
    case("Cumsum", lambda x: tf.cumsum(x, -1, reverse=True), (2, N, 3)),
    case("Cumsum", tf.cumsum, (N, 3), whole=["S"]),
    case("Cumprod", lambda x: tf.math.cumprod(x, 1), (N, 3)),
    case("Cumprod", tf.math.cumprod, (N, 3), whole=["S"]),
    case("CumulativeLogsumexp", lambda x: tf.math.cumulative_logsumexp(x, 1), (N, 3)),
    case("ReverseV2", lambda x: tf.reverse(x, [1]), (N, 3)),
    case("ReverseV2", lambda x: tf.reverse(x, [0, -1]), (2, N, 3)),
    case("ReverseV2", lambda x: tf.reverse(x, [0]), (N, 3), whole=["S"]),
    case("Roll", lambda x: tf.roll(x, 1, 1), (N, 3)),
    case("Roll", lambda x: tf.roll(x, [1, 2], [0, -1]), (2, N, 3)),
    case("Roll", lambda x: tf.roll(x, 1, 0), (N, 3), whole=["S"]),
]
