"""Cases of the rules of `llmos_tf.partition.rules.products`."""

import itertools

import tensorflow as tf

from partitioning.cases import N, case, raw


def _matmuls():
    for left, right in itertools.product((False, True), repeat=2):
        fn = raw("MatMul", transpose_a=left, transpose_b=right)
        for a, k, b in ((N, 3, 2), (2, N, 4), (2, 3, N), (N, 3, N)):
            first = (k, a) if left else (a, k)
            second = (b, k) if right else (k, b)
            yield case("MatMul", fn, first, second)


def _batch_matmuls():
    pairs = (
        ((N, 2, 3), (N, 3, 4)),
        ((2, N, 3), (2, 3, 4)),
        ((2, 3, N), (2, N, 4)),
        ((2, 3, 4), (2, 4, N)),
        ((N, 2, 3, 4), (N, 2, 4, 5)),
        ((N, 2, 3, 4), (4, 5)),
        ((1, 2, 3), (N, 3, 4)),
        ((N, 1, 2, 3), (2, 3, 4)),
        ((N, 1, 2, 3), (4, 3, 2)),
        ((3, 2, N), (N, 4)),
    )
    for first, second in pairs:
        yield case("BatchMatMulV2", raw("BatchMatMulV2"), first, second)
        flipped = [(*x[:-2], x[-1], x[-2]) for x in (first, second)]
        yield case("BatchMatMulV2", raw("BatchMatMulV2", adj_x=True, adj_y=True), *flipped)
    yield case("BatchMatMul", raw("BatchMatMul"), *pairs[0])
    yield case("BatchMatMul", raw("BatchMatMul", adj_y=True), (N, 2, 3), (N, 4, 3))
    yield case("BatchMatMulV3", raw("BatchMatMulV3", Tout=tf.float64), *pairs[0])


def _einsums():
    shapes = {"b": N, "i": 2, "j": 3, "k": 4}
    equations = [
        *("bi,ij->bj", "bij,bjk->bik", "bi,bj->ij", "bi,bi->b", "b,bi->i", "bij,bkj->bik"),
        *("ij,jb->ib", "bi->b", "bij,ijk->bk", "bi,j->bij", "b,b->", "bij->jib", "bi,ci->bc"),
        "i,->i",
    ]
    for equation in equations:
        inputs = equation.split("->")[0].split(",")
        made = [tuple(shapes.get(letter, N) for letter in labels) for labels in inputs]
        yield case("Einsum", lambda *x, e=equation: raw("Einsum", equation=e)(x), *made)
    broadcast = (
        ("...i,ij->...j", (N, 2), (2, 3)),
        ("...ij,...jk->...ik", (N, 2, 3), (N, 3, 4)),
        ("...ij,...jk->...ik", (2, N, 2, 3), (N, 3, 4)),
        ("...ij,...jk->...ik", (1, 2, 3), (N, 3, 4)),
        ("b...i,b...i->b...", (N, 2, 3), (N, 2, 3)),
    )
    for equation, *shapes in broadcast:
        yield case("Einsum", lambda *x, e=equation: raw("Einsum", equation=e)(x), *shapes)


CASES = [
    *_matmuls(),
    *_batch_matmuls(),
    *_einsums(),
    case("BiasAdd", tf.nn.bias_add, (N, 3), (3,)),
    case("BiasAdd", tf.nn.bias_add, (2, N, 3), (3,)),
    case("BiasAdd", tf.nn.bias_add, (2, N), (N,)),
    case("BiasAdd", raw("BiasAdd", data_format="NCHW"), (N, 3, 2, 2), (3,)),
]
