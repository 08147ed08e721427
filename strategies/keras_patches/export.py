"""`model.export` writes a model of one device, whatever mesh it was trained on.

A SavedModel has one variable in place of all parts of a variable, and its functions as they were
traced. A function that put a value together from parts would find the whole in place of each. So a
model is exported with plain variables of the full values, which serve on any device.
"""

import contextlib
import functools
from collections.abc import Iterator

import keras

from llmos_tf import _internal
from llmos_tf.sharding import ShardedVariable


@functools.cache
def hook_export() -> None:
    """Has `keras.Model.export` write full values for models made under a mesh strategy's scope."""
    original = keras.Model.export

    @functools.wraps(original)
    def export(model, *args, **kwargs):
        with whole_variables(model):
            return original(model, *args, **kwargs)

    keras.Model.export = export


@contextlib.contextmanager
def whole_variables(model: keras.Model) -> Iterator[None]:
    """Gives a model plain variables of full values for the time of the context.

    Args:
        model: whose variables of a mesh are exchanged; what else it has stays.
    """
    meshed = [v for v in model.variables if isinstance(v._value, ShardedVariable)]
    before = [variable._value for variable in meshed]
    try:
        for variable in meshed:
            variable._value = _internal.ResourceVariable(
                variable.numpy(), trainable=variable.trainable, name=variable.name
            )
        yield
    finally:
        for variable, value in zip(meshed, before, strict=True):
            variable._value = value
