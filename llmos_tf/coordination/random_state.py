"""The state of the generators that Keras, NumPy, Python and TensorFlow draw from by default."""

import random
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import _internal


def random_state() -> dict[str, Any]:
    """Returns the states, as JSON has them."""
    if _internal.eager_context.global_seed() is None:
        # Without a seed TensorFlow draws one for each op, which no other process could draw.
        tf.random.set_seed(random.SystemRandom().getrandbits(31))
    kind, keys, *rest = np.random.get_state()
    return {
        "keras": _internal.keras_random_seed(),
        "python": _as_lists(random.getstate()),
        "numpy": [kind, keys.tolist(), *rest],
        "tensorflow": _internal.eager_context.global_seed(),
        "ops": _as_lists(_internal.op_seeds().getstate()),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets the states.

    Args:
        state: as `random_state` has returned it, in this process or another.
    """
    if state["keras"] not in (None, _internal.keras_random_seed()):
        keras.utils.set_random_seed(state["keras"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    tf.random.set_seed(state["tensorflow"])
    version, words, gauss = state["ops"]
    _internal.op_seeds().setstate((version, tuple(words), gauss))


def _as_lists(state: tuple) -> list:
    """The state of a `random.Random`, as it comes back from JSON."""
    version, words, gauss = state
    return [version, list(words), gauss]
