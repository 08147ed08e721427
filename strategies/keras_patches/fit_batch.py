"""The shapes of the batches of `fit`, for what is counted of a step that takes any number of rows.

A dataset that does not drop its remainder says nothing of its rows in its type, and Keras traces
the step for any number. What a whole batch sends, `llmos_tf.collectives.traffic` finds by this.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.collectives.traffic_report import note_batch

# Of arrays, where `fit` is not told.
_KERAS_ROWS = 32


@functools.cache
def hook_fit() -> None:
    """Has `fit` note the shapes of a whole batch on models of a mesh, from now on."""
    _internal.TensorFlowTrainer.fit = _noting(_internal.TensorFlowTrainer.fit)


def _noting(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def fit(model, *args, **kwargs):
        if getattr(model.distribute_strategy.extended, "mesh", None) is not None:
            note_batch(model, batch_specs(signature.bind(model, *args, **kwargs).arguments))
        return original(model, *args, **kwargs)

    return fit


def batch_specs(arguments: Mapping[str, Any]) -> Any:
    """Returns the specs of a whole batch.

    Args:
        arguments: of `fit`.

    Returns:
        Nested `tf.TensorSpec`s; None where the data do not tell, as those of a generator.
    """
    x = arguments.get("x")
    if isinstance(x, tf.data.Dataset):
        return _specs_of_dataset(x)
    data = keras.utils.pack_x_y_sample_weight(x, arguments.get("y"), arguments.get("sample_weight"))
    leaves = tf.nest.flatten(data)
    if any(leaf is not None and not hasattr(leaf, "shape") for leaf in leaves):
        return None
    rows = arguments.get("batch_size") or _KERAS_ROWS
    return tf.nest.map_structure(lambda leaf: _spec_of_array(leaf, rows), data)


def _specs_of_dataset(dataset: tf.data.Dataset) -> Any:
    specs = dataset.element_spec
    leaves = tf.nest.flatten(specs)
    if not all(isinstance(spec, tf.TensorSpec) and spec.shape.rank for spec in leaves):
        return None
    if all(spec.shape.is_fully_defined() for spec in leaves):
        return specs
    try:
        # What `tf.distribute` asks to cut batches for replicas; -1 where it is not known.
        variant = tf.data.experimental.to_variant(dataset)
        rows = int(tf.raw_ops.ComputeBatchSize(input_dataset=variant))
    except tf.errors.OpError:
        return None
    if rows < 1:
        return None
    return tf.nest.map_structure(lambda s: tf.TensorSpec([rows, *s.shape[1:]], s.dtype), specs)


def _spec_of_array(x: Any, rows: int) -> tf.TensorSpec | None:
    if x is None:
        return None
    dtype = x.dtype if isinstance(x, tf.Tensor) else np.asarray(x).dtype
    return tf.TensorSpec([min(rows, x.shape[0]), *x.shape[1:]], dtype)
