"""Cases of the rules of `llmos_tf.partition.rules.randomness`.

Without a seed there is no result of one device: it is compared what does not depend on the draw.
"""

import tensorflow as tf

from partitioning.cases import N, case, raw


def _is_of_rows(op, *bounds, **attributes):
    """Zeros of the shape of rows, for whichever numbers are drawn."""
    return lambda x: 0 * tf.cast(raw(op, **attributes)(tf.shape(x), *bounds), x.dtype)


def _shuffled(x):
    return tf.reduce_sum(raw("RandomShuffle")(tf.range(tf.shape(x)[0])))


def _drawn_of(op, *parameters, **attributes):
    """Zeros by the first rank's numbers, which all ranks are given."""
    return lambda x: x + 0 * tf.reduce_sum(tf.cast(raw(op, **attributes)(*parameters), x.dtype))


CASES = [
    case("RandomStandardNormal", _is_of_rows("RandomStandardNormal", dtype=tf.float64), (N, 3)),
    case("RandomStandardNormal", _is_of_rows("RandomStandardNormal", dtype=tf.float64), (3, N)),
    case("RandomUniform", _is_of_rows("RandomUniform", dtype=tf.float64), (N,)),
    case("RandomUniform", _is_of_rows("RandomUniform", dtype=tf.float64, seed=1), (N,)),
    case("TruncatedNormal", _is_of_rows("TruncatedNormal", dtype=tf.float64), (N, 3)),
    case("RandomUniformInt", _is_of_rows("RandomUniformInt", 0, 9), (N, 3)),
    case("RandomShuffle", _shuffled, (N, 3)),
    case("RandomGamma", _drawn_of("RandomGamma", [3], [0.5]), (N, 3)),
    case("RandomPoissonV2", _drawn_of("RandomPoissonV2", [3], [0.5]), (N, 3)),
    case(
        "ParameterizedTruncatedNormal",
        _drawn_of("ParameterizedTruncatedNormal", [3], 0.0, 1.0, -1.0, 1.0),
        (N, 3),
    ),
    case("Multinomial", lambda x: 0 * raw("Multinomial")(x, 2), (N, 3)),
    case("Multinomial", lambda x: 0 * raw("Multinomial", seed=3)(x, 2), (N, 3), whole=["S"]),
]
