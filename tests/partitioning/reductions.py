"""Cases of the rules of `llmos_tf.partition.rules.reductions`."""

import tensorflow as tf

from partitioning.cases import Input, N, case, raw

_REDUCED = {
    "Max": tf.reduce_max,
    "Mean": tf.reduce_mean,
    "Min": tf.reduce_min,
    "Sum": tf.reduce_sum,
}
_AXES = ((0,), (1,), (-1,), (0, 2), (1, 2), None)


def _reductions(op, fn, kind, over_rows=True):
    for axes in _AXES:
        for shape in ((N, 3, 2), (3, N, 2)):
            reduced = range(3) if axes is None else [axis % 3 for axis in axes]
            whole = () if over_rows or shape.index(N) not in reduced else ("S",)
            yield case(op, lambda x, axes=axes: fn(x, axes), Input(shape, kind), whole=whole)
    yield case(op, lambda x: fn(x, 1, True), Input((2, 3, N), kind))
    if over_rows:
        yield case(op, lambda x: fn(x, [0, 1], True), Input((N, 2), kind))
        # The length of a dimension that counts rows several times.
        yield case(op, lambda x: fn(tf.reshape(x, [-1, 2]), 0), Input((N, 3, 2), kind))


CASES = [
    *(one for op, fn in _REDUCED.items() for one in _reductions(op, fn, "unit")),
    *_reductions("Prod", tf.reduce_prod, "unit", over_rows=False),
    *_reductions("EuclideanNorm", tf.math.reduce_euclidean_norm, "unit", over_rows=False),
    *_reductions("All", tf.reduce_all, "bool"),
    *_reductions("Any", tf.reduce_any, "bool"),
    case("Sum", tf.reduce_sum, Input((N, 3), "int")),
    case("Sum", lambda x: tf.reduce_sum(x, 0), Input((N, 3), "complex")),
    case("Max", lambda x: tf.reduce_max(x, 0), Input((N, 3), "int")),
    case("Mean", tf.reduce_mean, Input((N, 3), "int"), whole=["S"]),
    case("Mean", lambda x: tf.reduce_mean(x, 1), Input((N, 3), "long")),
    case("L2Loss", tf.nn.l2_loss, (N, 3)),
    case("L2Loss", tf.nn.l2_loss, (3, N)),
    case("ReduceJoin", lambda x: tf.strings.reduce_join(x, -1), Input((N, 3), "text")),
    case("ReduceJoin", lambda x: tf.strings.reduce_join(x, 0), Input((N, 3), "text"), whole=["S"]),
    case("BiasAddGrad", raw("BiasAddGrad"), (N, 3)),
    case("BiasAddGrad", raw("BiasAddGrad"), (2, N, 3)),
    case("BiasAddGrad", raw("BiasAddGrad"), (2, N)),
    case("BiasAddGrad", raw("BiasAddGrad", data_format="NCHW"), (N, 3, 2, 2)),
    case("BiasAddGrad", raw("BiasAddGrad", data_format="NCHW"), (2, N, 2, 2)),
]
