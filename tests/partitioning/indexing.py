"""Cases of the rules of `llmos_tf.partition.rules.indexing`."""

import tensorflow as tf

from partitioning.cases import Input, N, case, raw


def _index(*shape):
    return Input(shape, "index")


_SEGMENTS = (
    ((N, 2), (N,)),
    ((4, N), (4,)),
    ((N, 3, 2), (N, 3)),
    ((3, N, 2), (3, N)),
    ((3, 2, N), (3,)),
)


def _segments(op):
    for data, ids in _SEGMENTS:
        yield case(op, lambda x, i: raw(op)(x, i, 3), data, _index(*ids))


def _scatter(indices, updates):
    return tf.scatter_nd(indices, updates, [3, 2])


def _bincount(is_binary=False):
    function = raw("DenseBincount", binary_output=is_binary)
    return lambda x, weights: function(x, 4, weights)


CASES = [
    # A table, and indices with rows.
    case("GatherV2", tf.gather, (3, 4), _index(N)),
    case("GatherV2", tf.gather, (3, 4), _index(N, 2)),
    case("GatherV2", tf.gather, (3, 4), _index(2, N)),
    case("GatherV2", lambda x, i: tf.gather(x, i, axis=1), (2, 3), _index(N, 2)),
    # Rows of which entries are looked up.
    case("GatherV2", lambda x, i: tf.gather(x, i, axis=1), (N, 3), _index(2)),
    case("GatherV2", lambda x, i: tf.gather(x, i, axis=1), (N, 3, 2), _index(2, 2)),
    case("GatherV2", lambda x, i: tf.gather(x, i, axis=0), (3, N), _index(2, 2)),
    case("GatherV2", lambda x, i: tf.gather(x, i, axis=1, batch_dims=1), (N, 3, 2), _index(N, 2)),
    case("GatherV2", lambda x, i: tf.gather(x, i, axis=2, batch_dims=1), (N, 2, 3), _index(N)),
    case("GatherV2", lambda x, i: tf.gather(x, i, axis=2, batch_dims=2), (2, N, 3), _index(2, N)),
    case("GatherV2", lambda x, i: tf.gather(x, i, batch_dims=1, axis=1), (2, 3, N), _index(2, 2)),
    case("GatherV2", lambda x, i: tf.gather(x, i, batch_dims=1, axis=1), (2, 3), _index(2, N)),
    # Rows are looked up.
    case("GatherV2", lambda x: tf.gather(x, tf.zeros([3], tf.int32)), (N, 2), whole=["S"]),
    case("GatherV2", lambda x, i: tf.gather(x, i % tf.shape(x)[0]), (N, 2), _index(N)),
    case("GatherV2", lambda x, i: tf.gather(x, i % tf.shape(x)[1], axis=1), (2, N), _index(N)),
    case("GatherNd", tf.gather_nd, (3, 3, 2), _index(N, 2)),
    case("GatherNd", tf.gather_nd, (3, 3, 2), _index(2, N, 1)),
    case("GatherNd", lambda x: tf.gather_nd(x, [[0]]), (N, 2), whole=["S"]),
    case("DenseBincount", _bincount(), _index(N, 3), (0,), placements=["SR"]),
    case("DenseBincount", _bincount(), _index(N), (0,), placements=["SR"]),
    case("DenseBincount", _bincount(), _index(3, N), (0,), placements=["SR"], whole=["SR"]),
    case("DenseBincount", _bincount(), _index(N, 3), (N, 3)),
    case("DenseBincount", _bincount(), _index(N), (N,)),
    # As many counts as the numbers ask for: TensorFlow infers no length of the result.
    case("DenseBincount", lambda x: tf.math.bincount(x, axis=-1), _index(N, 3)),
    case("DenseBincount", _bincount(True), _index(N, 3), (0,), placements=["SR"]),
    case("DenseBincount", _bincount(True), _index(N), (0,), placements=["SR"]),
    case("OneHot", lambda i: tf.one_hot(i, 3, dtype=tf.float64), _index(N)),
    case("OneHot", lambda i: tf.one_hot(i, 3, axis=0, dtype=tf.float64), _index(N, 2)),
    case("OneHot", lambda i: tf.one_hot(i, 3, axis=1, dtype=tf.float64), _index(2, N)),
    case("OneHot", lambda i: tf.one_hot(i, 3), _index(2, N)),
    case("HistogramFixedWidth", lambda x: tf.histogram_fixed_width(x, [-1.0, 1.0], 5), (N, 2)),
    case("LowerBound", lambda s, x: tf.searchsorted(s, x), Input((3,), "unit"), (N,)),
    case("UpperBound", lambda s, x: tf.searchsorted(s, x, "right"), (N, 1), (N, 3)),
    case("ScatterNd", _scatter, _index(N, 1), (N, 2)),
    case("ScatterNd", _scatter, _index(2, N, 1), (2, N, 2)),
    case("ScatterNd", lambda i, x: tf.scatter_nd(tf.abs(i) % 2, x, [2, 2]), _index(N, 2), (N,)),
    case("OneHot", lambda i: tf.one_hot(i, 4, on_value=2, off_value=1), Input((N,), "long")),
    *(
        one
        for op in ("UnsortedSegmentMax", "UnsortedSegmentMin", "UnsortedSegmentSum")
        for one in _segments(op)
    ),
]
