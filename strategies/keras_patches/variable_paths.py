"""The paths of Keras's variables, by which layouts are found."""

import contextlib
import functools

import keras


@functools.cache
def hook_variable_paths() -> None:
    """Has Keras make every variable under the path that it shows, from now on.

    A model without an input shape is built by its first batch, in a trace. Keras makes the
    variables after it, when the names of the layers around them are forgotten.
    """
    original = keras.Variable._deferred_initialize

    @functools.wraps(original)
    def _deferred_initialize(variable):
        with contextlib.ExitStack() as scopes:
            for name in variable.path.split("/")[:-1]:
                scopes.enter_context(keras.name_scope(name))
            return original(variable)

    keras.Variable._deferred_initialize = _deferred_initialize
