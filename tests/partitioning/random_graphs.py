"""Random functions of rows and weights, with the gradient of a scalar, by a seed."""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from partitioning.cases import N

# Shapes of the inputs, in which N counts rows.
ROWS = ((N, 3), (N, 4, 2), (N,))
WEIGHTS = ((3, 4), (2, 3), (3,))
NUM_INDICES = 3
_MOST_ENTRIES, _MOST_DIMS, _USUAL_ROWS = 3000, 4, 12
_SMOOTH = (tf.tanh, tf.sin, tf.sigmoid, tf.square, tf.negative, tf.identity, tf.nn.softplus)
_SHARP = (tf.abs, tf.nn.relu, tf.nn.leaky_relu, tf.nn.elu)


class Made(NamedTuple):
    """A tensor of a random graph.

    Args:
        x: the tensor.
        shape: its lengths: a number, or (N, k) for k entries for each row.
        exact: whether it has no sums, which ranks add up in another order: only of such a value
            it is sure which of two entries is larger.
    """

    x: tf.Tensor
    shape: tuple
    exact: bool

    @property
    def is_small(self):
        entries = math.prod(_USUAL_ROWS * n[1] if isinstance(n, tuple) else n for n in self.shape)
        return entries <= _MOST_ENTRIES and len(self.shape) <= _MOST_DIMS


def values_of(num_rows, seed=0):
    """The arrays that a random function is given."""
    rng = np.random.default_rng([seed, num_rows])
    rows = [rng.normal(size=[num_rows, *shape[1:]]) for shape in ROWS]
    weights = [rng.normal(size=shape) for shape in WEIGHTS]
    return [*rows, *weights, rng.integers(0, NUM_INDICES, num_rows).astype(np.int32)]


def which_have_rows():
    """Which of the arrays have rows."""
    return [True] * len(ROWS) + [False] * len(WEIGHTS) + [True]


def random_function(seed):
    """A function of tensors like `values_of`, of 5 to 30 ops and their gradients."""

    def function(*tensors):
        return _Graph(np.random.default_rng(seed), tensors).results()

    return function


class _Graph:
    def __init__(self, rng, tensors):
        self._rng = rng
        *floats, self._indices = tensors
        self._inputs = floats
        shapes = [tuple((N, 1) if n == N else n for n in shape) for shape in ROWS + WEIGHTS]
        self._made = [Made(x, s, True) for x, s in zip(floats, shapes, strict=True)]

    def results(self):
        count = len(self._made) + self._rng.integers(5, 31)
        while len(self._made) < count:
            method = self._pick(_OPS)
            made = method(self, self._recent())
            if made is not None and made.is_small:
                self._made.append(made)
        last = self._made[-4:]
        terms = [self._pick((tf.reduce_sum, tf.reduce_mean))(tf.tanh(made.x)) for made in last]
        scalar = tf.add_n(terms)
        gradients = tf.gradients(scalar, self._inputs, unconnected_gradients="zero")
        gradients = map(tf.convert_to_tensor, gradients)
        return [scalar, *(tf.tanh(made.x) for made in last), *gradients]

    # --- choices ----------------------------------------------------------------------------------

    def _pick(self, options):
        return options[self._rng.integers(len(options))]

    def _recent(self):
        """A value: more often one of the last."""
        if self._rng.random() < 0.6:
            return self._pick(self._made[-4:])
        return self._pick(self._made)

    def _axis(self, made):
        return int(self._rng.integers(len(made.shape)))

    def _lengths(self, made, shape):
        """A shape as a tensor or list; rows are counted by what is there."""
        rows = tf.shape(self._inputs[0])[0]
        del made
        return [rows * n[1] if isinstance(n, tuple) else n for n in shape]

    # --- ops: each is given a value, and returns another one or None ------------------------------

    def unary(self, a):
        fn = self._pick(_SMOOTH + _SHARP if a.exact else _SMOOTH)
        return Made(fn(a.x), a.shape, a.exact)

    def binary(self, a):
        for _ in range(5):
            b = self._pick(self._made)
            shape = _broadcast(a.shape, b.shape)
            if shape is not None:
                fn = self._pick((tf.add, tf.subtract, tf.multiply, tf.math.squared_difference))
                return Made(fn(a.x, b.x), shape, a.exact and b.exact)
        return None

    def divide(self, a):
        for _ in range(5):
            b = self._pick(self._made)
            shape = _broadcast(a.shape, b.shape)
            if shape is not None:
                return Made(a.x / (1 + tf.square(b.x)), shape, a.exact and b.exact)
        return None

    def select(self, a):
        b = self._pick(self._made)
        if not b.exact or _broadcast(a.shape, b.shape) != a.shape:
            return None
        return Made(tf.where(b.x > 0.1, a.x, -a.x), a.shape, a.exact)

    def reduce(self, a):
        if not a.shape:
            return None
        axes = sorted({self._axis(a) for _ in range(self._rng.integers(1, 3))})
        keeps = bool(self._rng.random() < 0.3)
        fns = [tf.reduce_sum, tf.reduce_mean]
        fns += [tf.reduce_max, tf.reduce_min] if a.exact else []
        fn = self._pick(fns)
        kept = enumerate(a.shape)
        shape = tuple(1 if i in axes else n for i, n in kept if keeps or i not in axes)
        exact = a.exact and fn in (tf.reduce_max, tf.reduce_min)
        return Made(fn(a.x, axes, keepdims=keeps), shape, exact)

    def matmul(self, a):
        if len(a.shape) < 2:
            return None
        for b in self._rng.permutation(len(self._made)):
            b = self._made[b]
            if len(b.shape) < 2 or len(b.shape) not in (2, len(a.shape)):
                continue
            if len(b.shape) > 2 and b.shape[:-2] != a.shape[:-2]:
                continue
            for left in (False, True):
                for right in (False, True):
                    i, k = a.shape[-2:][:: -1 if left else 1]
                    m, j = b.shape[-2:][:: -1 if right else 1]
                    if k == m:
                        y = tf.matmul(a.x, b.x, transpose_a=left, transpose_b=right)
                        return Made(tf.tanh(y), (*a.shape[:-2], i, j), False)
        return None

    def transpose(self, a):
        order = self._rng.permutation(len(a.shape)).tolist()
        return Made(tf.transpose(a.x, order), tuple(a.shape[i] for i in order), a.exact)

    def merge(self, a):
        if len(a.shape) < 2:
            return None
        i = int(self._rng.integers(len(a.shape) - 1))
        one, other = a.shape[i : i + 2]
        if isinstance(one, tuple) and isinstance(other, tuple):
            return None
        if isinstance(one, tuple) or isinstance(other, tuple):
            rows, number = (one, other) if isinstance(one, tuple) else (other, one)
            merged = (N, rows[1] * number)
        else:
            merged = one * other
        shape = (*a.shape[:i], merged, *a.shape[i + 2 :])
        return Made(tf.reshape(a.x, self._lengths(a, shape)), shape, a.exact)

    def unmerge(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        n = a.shape[i]
        factors = [k for k in (2, 3, 4) if (n[1] if isinstance(n, tuple) else n) % k == 0]
        if not factors:
            return None
        k = self._pick(factors)
        two = [(N, n[1] // k), k] if isinstance(n, tuple) else [n // k, k]
        if self._rng.random() < 0.3:
            two.reverse()
        shape = (*a.shape[:i], *two, *a.shape[i + 1 :])
        return Made(tf.reshape(a.x, self._lengths(a, shape)), shape, a.exact)

    def expand(self, a):
        i = int(self._rng.integers(len(a.shape) + 1))
        return Made(tf.expand_dims(a.x, i), (*a.shape[:i], 1, *a.shape[i:]), a.exact)

    def squeeze(self, a):
        ones = [i for i, n in enumerate(a.shape) if n == 1]
        if not ones:
            return None
        i = self._pick(ones)
        return Made(tf.squeeze(a.x, [i]), a.shape[:i] + a.shape[i + 1 :], a.exact)

    def concat(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        for b in self._rng.permutation(len(self._made)):
            b = self._made[b]
            is_like = len(b.shape) == len(a.shape) and all(
                m == n or place == i
                for place, (m, n) in enumerate(zip(a.shape, b.shape))  # noqa: B905
            )
            if is_like and isinstance(a.shape[i], tuple) == isinstance(b.shape[i], tuple):
                one, other = a.shape[i], b.shape[i]
                n = (N, one[1] + other[1]) if isinstance(one, tuple) else one + other
                shape = (*a.shape[:i], n, *a.shape[i + 1 :])
                return Made(tf.concat([a.x, b.x], i), shape, a.exact and b.exact)
        return None

    def stack(self, a):
        alike = [b for b in self._made if b.shape == a.shape]
        b, i = self._pick(alike), int(self._rng.integers(len(a.shape) + 1))
        shape = (*a.shape[:i], 2, *a.shape[i:])
        return Made(tf.stack([a.x, b.x], i), shape, a.exact and b.exact)

    def slice(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        at = (slice(None),) * i
        n = a.shape[i]
        kind = self._rng.integers(3)
        if isinstance(n, tuple) or n < 2:
            return Made(a.x[(*at, slice(None, None, -1))], a.shape, a.exact)
        if kind == 0:
            return Made(
                a.x[(*at, int(self._rng.integers(n)))], a.shape[:i] + a.shape[i + 1 :], a.exact
            )
        if kind == 1:
            return Made(
                a.x[(*at, slice(1, None))], (*a.shape[:i], n - 1, *a.shape[i + 1 :]), a.exact
            )
        shape = (*a.shape[:i], -(-n // 2), *a.shape[i + 1 :])
        return Made(a.x[(*at, slice(None, None, 2))], shape, a.exact)

    def look_up(self, a):
        """Entries of a table by the rows' indices."""
        axes = [i for i, n in enumerate(a.shape) if not isinstance(n, tuple) and n >= NUM_INDICES]
        if not axes:
            return None
        i = self._pick(axes)
        shape = (*a.shape[:i], (N, 1), *a.shape[i + 1 :])
        return Made(tf.gather(a.x, self._indices, axis=i), shape, a.exact)

    def look_up_in_rows(self, a):
        """An entry of each row by its index."""
        if len(a.shape) < 2 or a.shape[0] != (N, 1):
            return None
        axes = [
            i for i, n in enumerate(a.shape) if i and not isinstance(n, tuple) and n >= NUM_INDICES
        ]
        if not axes:
            return None
        i = self._pick(axes)
        return Made(
            tf.gather(a.x, self._indices, axis=i, batch_dims=1),
            a.shape[:i] + a.shape[i + 1 :],
            a.exact,
        )

    def segments(self, a):
        if not a.shape or a.shape[0] != (N, 1):
            return None
        y = tf.math.unsorted_segment_sum(a.x, self._indices, NUM_INDICES)
        return Made(tf.tanh(y), (NUM_INDICES, *a.shape[1:]), False)

    def softmax(self, a):
        if not a.shape:
            return None
        fn = self._pick((tf.nn.softmax, tf.nn.log_softmax, tf.math.l2_normalize))
        axis = self._axis(a) if self._rng.random() < 0.5 else -1
        return Made(fn(a.x, axis), a.shape, False)

    def logsumexp(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        return Made(tf.reduce_logsumexp(a.x, i), a.shape[:i] + a.shape[i + 1 :], False)

    def moments(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        mean, variance = tf.nn.moments(a.x, i, keepdims=True)
        return Made((a.x - mean) * tf.math.rsqrt(variance + 0.1), a.shape, False)

    def cumsum(self, a):
        if not a.shape:
            return None
        y = tf.cumsum(a.x, self._axis(a), reverse=bool(self._rng.random() < 0.5))
        return Made(tf.tanh(y), a.shape, False)

    def noise(self, a):
        seed = self._rng.integers(0, 1000, 2)
        fn = self._pick((tf.random.stateless_normal, tf.random.stateless_uniform))
        noise = fn(tf.shape(a.x), seed, dtype=self._pick((tf.float64, tf.float32)))
        return Made(a.x + tf.cast(noise, tf.float64), a.shape, a.exact)

    def dropout(self, a):
        seed = self._rng.integers(0, 1000, 2)
        return Made(tf.nn.experimental.stateless_dropout(a.x, 0.4, seed), a.shape, a.exact)

    def one_hot(self, a):
        if not a.exact or not a.shape:
            return None
        i = self._axis(a)
        hot = tf.one_hot(tf.argmax(a.x, i), 3, dtype=tf.float64)
        return Made(hot, (*a.shape[:i], *a.shape[i + 1 :], 3), True)

    def top(self, a):
        if not a.exact or not a.shape or isinstance(a.shape[-1], tuple) or a.shape[-1] < 2:
            return None
        return Made(tf.math.top_k(a.x, 2).values, (*a.shape[:-1], 2), True)

    def split(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        if isinstance(a.shape[i], tuple) or a.shape[i] % 2:
            return None
        shape = (*a.shape[:i], a.shape[i] // 2, *a.shape[i + 1 :])
        one, other = tf.split(a.x, 2, i)
        return Made(one * tf.cos(other), shape, a.exact)

    def pad(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        if isinstance(a.shape[i], tuple):
            return None
        paddings = [[1, 1] if place == i else [0, 0] for place in range(len(a.shape))]
        shape = (*a.shape[:i], a.shape[i] + 2, *a.shape[i + 1 :])
        return Made(tf.pad(a.x, paddings, constant_values=self._pick((0, 1))), shape, a.exact)

    def tile(self, a):
        if not a.shape:
            return None
        i = self._axis(a)
        n = a.shape[i]
        times = [2 if place == i else 1 for place in range(len(a.shape))]
        n = (N, n[1] * 2) if isinstance(n, tuple) else n * 2
        return Made(tf.tile(a.x, times), (*a.shape[:i], n, *a.shape[i + 1 :]), a.exact)

    def repeat_for_rows(self, a):
        shape = ((N, 1), *a.shape)
        return Made(tf.broadcast_to(a.x, self._lengths(a, shape)), shape, a.exact)

    def scale_by_rows(self, a):
        rows = tf.cast(tf.shape(self._inputs[0])[0], tf.float64)
        return Made(a.x / rows, a.shape, a.exact)

    def outer(self, a):
        if len(a.shape) != 1:
            return None
        alike = [b for b in self._made if len(b.shape) == 1]
        b = self._pick(alike)
        return Made(tf.einsum("i,j->ij", a.x, b.x), (*a.shape, *b.shape), a.exact and b.exact)

    def einsum(self, a):
        if len(a.shape) < 2:
            return None
        letters = "abcde"[: len(a.shape)]
        i = self._axis(a)
        kept = letters.replace(letters[i], "")
        y = tf.einsum(f"{letters},{letters}->{kept}", a.x, tf.cos(a.x))
        return Made(tf.tanh(y), a.shape[:i] + a.shape[i + 1 :], False)


_OPS = [value for name, value in vars(_Graph).items() if name[0] != "_" and name != "results"]


def _broadcast(one, other):
    """The shape of what is broadcast; None where it is not."""
    rank = max(len(one), len(other))
    first = (1,) * (rank - len(one)) + tuple(one)
    second = (1,) * (rank - len(other)) + tuple(other)
    shape = []
    for m, n in zip(first, second, strict=True):
        if m != n and 1 not in (m, n):
            return None
        shape.append(n if m == 1 else m)
    return tuple(shape)
