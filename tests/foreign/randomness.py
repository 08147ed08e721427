"""The same random numbers in each run of a test, also where the test asks for other ones."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import keras
import numpy as np

SEED = 0


@contextlib.contextmanager
def fixed_seeds() -> Iterator[None]:
    """Seeds Python, numpy, TensorFlow and Keras, and numpy again where a test leaves out a seed."""
    keras.utils.set_random_seed(SEED)
    with (
        # Keras's test data are seeded with None, which is another seed each time.
        mock.patch.object(np.random, "seed", _seeded(np.random.seed)),
        mock.patch.object(np.random, "default_rng", _seeded(np.random.default_rng)),
    ):
        yield


def _seeded(original: Callable) -> Callable:
    @functools.wraps(original)
    def seeded(seed=None):
        return original(SEED if seed is None else seed)

    return seeded
