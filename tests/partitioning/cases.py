"""Cases: an op, a function that uses it, and the shapes of its inputs, in which N counts rows.

A case is run for each product of placements of its inputs: S, sharded along the dimension of the
rows; R, on every rank; P, of which each rank has a part of the sum. All cases of a table are one
traced function.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from llmos_tf.partition.planner import PASS_PARTS
from llmos_tf.partition.rules import RULES
from llmos_tf.partition.rules.elementwise import elementwise
from partitioning.harness import Partitioned

N = "n"
_WEIGHTS = "weights"


class Input(NamedTuple):
    """An input: its shape, and of which kind its entries are."""

    shape: tuple
    kind: str = "normal"

    @property
    def row_dim(self):
        return self.shape.index(N) if N in self.shape else None

    @property
    def placements(self):
        """The placements in which it can be."""
        placements = "SR" if N in self.shape else "R"
        return placements + ("P" if self.kind in ("normal", "unit", "positive") else "")


class Case(NamedTuple):
    """An op type, a function with an op of it, the function's inputs, and what has no rule.

    Args:
        op: the type.
        fn: of tensors.
        inputs: shapes, or `Input`s.
        whole: placements of the inputs, such as "SR", with which ops are computed whole.
        placements: those that are run; None for all.
    """

    op: str
    fn: Callable
    inputs: tuple
    whole: Sequence[str] = ()
    placements: Sequence[str] | None = None

    @property
    def variants(self):
        if self.placements is not None:
            return list(self.placements)
        found = map("".join, itertools.product(*(x.placements for x in self.inputs)))
        return [placements for placements in found if set(placements) != {"R"}]


def case(op, fn, *inputs, whole=(), placements=None):
    """A case, of inputs that are shapes or `Input`s."""
    made = tuple(x if isinstance(x, Input) else Input(tuple(x)) for x in inputs)
    return Case(op, fn, made, whole, placements)


def raw(op, **attributes):
    """A function of an op's inputs, in the order of its definition."""
    function = getattr(tf.raw_ops, op)
    names = [name for name in inspect.signature(function).parameters if name not in attributes]
    return lambda *inputs: function(**dict(zip(names, inputs, strict=False)), **attributes)


# Makes entries of a kind, of a generator and a shape.
_KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "unit": lambda rng, shape: rng.uniform(0.1, 0.9, shape),
    "positive": lambda rng, shape: rng.uniform(1.1, 4, shape),
    # Also numbers that are whole, or equal.
    "halves": lambda rng, shape: rng.integers(-4, 5, shape) / 2,
    "index": lambda rng, shape: rng.integers(0, 3, shape).astype(np.int32),
    "int": lambda rng, shape: rng.integers(1, 9, shape).astype(np.int32),
    "long": lambda rng, shape: rng.integers(-9, 9, shape).astype(np.int64),
    "bool": lambda rng, shape: rng.integers(0, 2, shape) == 1,
    "complex": lambda rng, shape: rng.normal(size=shape) + 1j * rng.normal(size=shape),
    "float32": lambda rng, shape: rng.normal(size=shape).astype(np.float32),
    "text": lambda rng, shape: rng.choice([b"ab", b"C d", b"12", b"x1y"], shape),
    "digits": lambda rng, shape: rng.choice([b"3", b"-1", b"12", b"0"], shape),
    "base64": lambda rng, shape: rng.choice([b"YQ", b"YWI", b"YWJj"], shape),
    "spd": lambda rng, shape: _positive_definite(rng, shape),
    "triangular": lambda rng, shape: np.tril(_positive_definite(rng, shape)),
}


def _positive_definite(rng, shape):
    x = rng.normal(size=shape)
    return x @ np.swapaxes(x, -1, -2) + 3 * np.eye(shape[-1])


class Table:
    """Cases that are run as one function.

    Args:
        cases: the cases.
        static: whether the number of rows is known to the trace.
        is_brief: whether to run some variants only, as the normal run does.
    """

    def __init__(self, cases, static=False, is_brief=False):
        self._variants = list(_brief(cases) if is_brief else ((one, one.variants) for one in cases))
        self._bases = {(_WEIGHTS, 0, "all"): None}
        for one, variants in self._variants:
            for placements in variants:
                for i, (x, placement) in enumerate(zip(one.inputs, placements, strict=True)):
                    self._bases.setdefault(_base(i, x, placement))
        rows = [self._rows(*key) for key in self._bases]
        self.partitioned = Partitioned(self._run, self.values(12), rows, static)

    @staticmethod
    def _rows(x, place, source):
        del place
        if x == _WEIGHTS:
            return True
        return source if x.row_dim is not None else False

    def values(self, num_rows, seed=0):
        """The arrays that the function is given."""
        made = []
        for x, place, _ in self._bases:
            rng = np.random.default_rng([seed, place])
            if x == _WEIGHTS:
                weights = rng.uniform(0.5, 1, num_rows)
                made.append(weights / max(weights.sum(), 1e-9))
                continue
            value = _KINDS[x.kind](rng, [num_rows if n == N else n for n in x.shape])
            made.append(value if x.row_dim is None else np.moveaxis(value, x.row_dim, 0))
        return made

    def scopes(self):
        """For each variant its scope, its case and its placements."""
        for i, (one, variants) in enumerate(self._variants):
            for placements in variants:
                yield f"case{i}_{one.op}_{placements}", one, placements

    def _run(self, *tensors):
        given = dict(zip(self._bases, tensors, strict=True))
        results = {}
        with tf.name_scope("inputs"):
            moved = {k: _rows_moved(k[0], x) for k, x in given.items()}
        weights = given[_WEIGHTS, 0, "all"]
        variants = list(self.scopes())
        # All inputs first: parts of all of them are reduced together then.
        with tf.name_scope("inputs"):
            inputs = [
                [
                    _as_part(moved[_base(i, x, p)], weights) if p == "P" else moved[_base(i, x, p)]
                    for i, (x, p) in enumerate(zip(one.inputs, placements, strict=True))
                ]
                for _, one, placements in variants
            ]
        for (scope, one, _), own in zip(variants, inputs, strict=True):
            with tf.name_scope(scope):
                # Flat, as a list of tensors and named tuples of ops are all the same here.
                results[scope] = tf.nest.flatten(one.fn(*own))
        with tf.name_scope("outputs"):
            num_rows = weights.shape[0]
            return tf.nest.map_structure(lambda x: _rows_first(x, num_rows), results)

    def check(self):
        """Asserts that each case has its op, and that what has a rule is not computed whole."""
        for scope, one, placements in self.scopes():
            assert one.op in self.partitioned.types_in(scope), scope
            whole = self.partitioned.whole_in(scope)
            if placements in one.whole:
                assert whole, f"{scope} has a rule"
            else:
                assert not whole, f"{scope} computes {whole} whole"


def _brief(cases):
    """Variants that the normal run takes: parts of sums where an op may be given them."""
    known = set()
    for one in cases:
        variants = one.variants
        if one.op in known or RULES.get(one.op) is elementwise:
            variants = variants[:1]
        elif one.op not in PASS_PARTS:
            variants = [v for v in variants if "P" not in v] or variants[:1]
        known.add(one.op)
        yield one, variants


def _base(place, x, placement):
    return x, place, True if placement == "S" else "all"


def _rows_moved(x, tensor):
    """Puts the rows, which come first, where the input has them."""
    if x == _WEIGHTS or not x.row_dim:
        return tensor
    order = list(range(1, len(x.shape)))
    order.insert(x.row_dim, 0)
    return tf.transpose(tensor, order)


def _rows_first(x, num_rows):
    """Puts rows first, in which place they are returned as they are."""
    if x.shape.rank is None:
        return x
    dims = [i for i, n in enumerate(x.shape) if n == num_rows]
    if len(dims) != 1 or dims == [0]:
        return x
    order = [*dims, *(i for i in range(x.shape.rank) if i not in dims)]
    return tf.transpose(x, order)


def _as_part(x, weights):
    """The same value as a sum over the rows, of which each rank has a part."""
    weights = tf.reshape(weights, [-1] + [1] * x.shape.rank)
    return tf.reduce_sum(weights * x[tf.newaxis], 0)
