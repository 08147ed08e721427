"""Variables whose gradient is their next value, such as the scales of float8 layers.

Every rank stores such a variable whole. What a tape returns for it is a value, and a variable that
is cut over the mesh would have those of the ranks added up.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.strategies.engine.variable_creation import OVERWRITTEN


@functools.cache
def hook_overwritten_variables() -> None:
    """Has Keras say of a variable that is to be overwritten so before it is made, from now on."""
    add_weight = keras.layers.Layer.add_weight
    initialize = keras.Variable._deferred_initialize

    @functools.wraps(add_weight)
    def _add_weight(layer, *args, **kwargs):
        with _overwritten(kwargs.get("overwrite_with_gradient")):
            return add_weight(layer, *args, **kwargs)

    @functools.wraps(initialize)
    def _deferred_initialize(variable):
        with _overwritten(variable.overwrite_with_gradient):
            return initialize(variable)

    keras.layers.Layer.add_weight = _add_weight
    keras.Variable._deferred_initialize = _deferred_initialize


@contextlib.contextmanager
def _overwritten(is_overwritten: Any) -> Iterator[None]:
    """Where variables of a mesh are made that are overwritten."""
    extended = tf.distribute.get_strategy().extended
    if not is_overwritten or getattr(extended, "mesh", None) is None:
        yield
        return
    with tf.variable_creator_scope(
        lambda creator, **kwargs: creator(**kwargs, **{OVERWRITTEN: True})
    ):
        yield
