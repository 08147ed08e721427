"""The paths of Keras's variables, by which layouts are found."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal


@functools.cache
def hook_variable_paths() -> None:
    """Patches Keras to create the value of every variable under the variable's own path.

    Keras often creates the value later than the variable: a model without an input shape is built
    by its first batch, and a layer without `build` by a trace of its `call`. By then the name
    scopes are those of a layer further out, or those of no layer.
    """
    original = keras.Variable._initialize

    @functools.wraps(original)
    def _initialize(variable: keras.Variable, value: Any) -> Any:
        with path_of(variable):
            return original(variable, value)

    keras.Variable._initialize = _initialize


@contextlib.contextmanager
def path_of(variable: keras.Variable) -> Iterator[None]:
    """Enters the name scopes of a variable, where others are entered.

    Args:
        variable: a Keras variable, with or without a value.
    """
    parent, _, _ = variable.path.rpartition("/")
    if _internal.current_path() == parent:
        # The owner of the scope stays known; see `variable_creation`.
        yield
        return
    above, _, last = parent.rpartition("/")
    # TensorFlow's name of the variable follows Keras's. With the slash a scope is absolute.
    with tf.name_scope(above and f"{above}/"), keras.name_scope(last, override_parent=above):
        yield
