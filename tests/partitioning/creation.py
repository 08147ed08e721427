"""Cases of the rules of `llmos_tf.partition.rules.creation`: what they make is added to rows."""

import tensorflow as tf

from partitioning.cases import N, case, raw

_SHAPES = ((N, 3), (N,), (N, 3, 5), (3, N), (N, 1))


def _key_and_counter():
    # As a seed that a step computes, which is not known to the plan.
    seed = tf.stack([tf.constant(5), 7])
    return tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)


def _random(op, *bounds, **attributes):
    def of(x):
        shape = tf.shape(x)
        numbers = raw(op, **attributes)(shape, *_key_and_counter(), 1, *bounds)
        return x + tf.cast(numbers, x.dtype)

    return of


def _randoms():
    for shape in _SHAPES:
        for op in ("StatelessRandomNormalV2", "StatelessRandomUniformV2"):
            for dtype in (tf.float64, tf.float32, tf.float16):
                yield case(op, _random(op, dtype=dtype), shape, placements=["S", "R"])
        for dtype in (tf.int32, tf.int64):
            bounds = [tf.constant(n, dtype) for n in (0, 1000)]
            op = "StatelessRandomUniformIntV2"
            yield case(op, _random(op, *bounds), shape, placements=["S"])
        op = "StatelessRandomUniformFullIntV2"
        for dtype in (tf.int32, tf.int64):
            yield case(op, _random(op, dtype=dtype), shape, placements=["S"])


CASES = [
    *_randoms(),
    case("Fill", lambda x: x + tf.fill(tf.shape(x), tf.constant(2, x.dtype)), (N, 3)),
    case("Fill", lambda x: x + tf.fill(tf.shape(x), tf.constant(2, x.dtype)), (3, N)),
    case("Fill", lambda x: tf.fill([tf.shape(x)[0] * 2, 3], 1), (N, 3), placements=["S"]),
    # Made in two placements.
    case("Fill", lambda x: _twice(tf.fill([tf.shape(x)[0]] * 2, tf.constant(1, x.dtype)), x), (N,)),
    case("BroadcastTo", lambda x, y: x + tf.broadcast_to(y, tf.shape(x)), (N, 3), (3,)),
    case("BroadcastTo", lambda x, y: x + tf.broadcast_to(y, tf.shape(x)), (N, 3), (1, 3)),
    case("BroadcastTo", lambda x, y: x + tf.broadcast_to(y, tf.shape(x)), (3, N), (3, 1)),
    case("BroadcastTo", lambda x, y: x + tf.broadcast_to(y, tf.shape(x)), (2, N, 3), (N, 1)),
    case("Tile", lambda x, y: x + tf.tile(y, [tf.shape(x)[0], 1]), (N, 3), (1, 3)),
    case("Tile", lambda x, y: x + tf.tile(y, [1, tf.shape(x)[1]]), (3, N), (3, 1)),
    case("Tile", lambda x, y: tf.tile(y, [tf.shape(x)[0], 1]), (N, 3), (2, 3), placements=["SR"]),
    case("Shape", lambda x: tf.shape(x), (N, 3)),
    case("Shape", lambda x: tf.shape(x, tf.int64), (3, N)),
    case("ShapeN", lambda *x: tf.shape_n(x), (N, 3), (3, N)),
    case("Size", tf.size, (N, 3)),
    case("Size", lambda x: tf.size(x, tf.int64), (2, N)),
    case("Rank", lambda x: raw("Rank")(x), (2, N)),
    case("Range", lambda x: x + tf.range(tf.shape(x)[0], dtype=x.dtype), (N,)),
    case("Range", lambda x: tf.range(0, 2 * tf.shape(x)[0], 2), (N,), placements=["S"]),
]


def _twice(made, x):
    return made * x[:, tf.newaxis], made * x
