"""How `fit` and the like build a model of a mesh before the first step.

On one device the step itself builds what is not built. Under a strategy Keras builds it first, by a
batch that it takes from the data, which has the data begin with their second batch, or another
order of a shuffle. Here it is built by the spec of the data.
"""

import contextlib
import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.strategies.engine.input import MeshDataset


@functools.cache
def hook_build() -> None:
    """Has `fit`, `evaluate` and the like leave the data alone on models of a mesh, from now on."""
    original = _internal.TensorFlowTrainer._maybe_symbolic_build

    @functools.wraps(original)
    def _maybe_symbolic_build(model, iterator=None, data_batch=None):
        strategy = model.distribute_strategy
        if getattr(strategy.extended, "mesh", None) is None:
            return original(model, iterator=iterator, data_batch=data_batch)
        specs = _specs_of_batch(data_batch) if iterator is None else _specs_of_data(iterator)
        with strategy.scope():
            build(model, specs)
            if not all(layer.built for layer in model._flatten_layers()):
                return
            if model.optimizer is not None and not model.optimizer.built:
                model.optimizer.build(model.trainable_variables)
            model._post_build()

    _internal.TensorFlowTrainer._maybe_symbolic_build = _maybe_symbolic_build


def build(model: keras.Model, specs: Any) -> None:
    """Makes the variables of a model, its metrics and its loss, where they are not made yet.

    Args:
        model: the model, under the scope of its strategy.
        specs: nested `tf.TypeSpec`s of a batch, as the model's step takes it.
    """
    unbuilt = [layer for layer in model._flatten_layers() if not layer.built]
    metrics, loss = model._compile_metrics, model._compile_loss
    builds_metrics = metrics is not None and not metrics.built
    builds_loss = loss is not None and not loss.built
    if not (unbuilt or builds_metrics or builds_loss):
        return

    def call():
        x, y, weights = keras.utils.unpack_x_y_sample_weight(_symbolic(specs))
        y_pred = model(x, training=False)
        if builds_metrics:
            model.compute_metrics(x, y, y_pred, sample_weight=weights)
        if builds_loss:
            model._compute_loss(x, y, y_pred, sample_weight=weights, training=False)

    # How a model with a step of its own is called, only that step knows. It builds the model when
    # it is traced, as on one device, and raises what is wrong with it.
    tried = contextlib.suppress(Exception) if _has_own_step(model) else contextlib.nullcontext()
    with tried:
        _internal.keras_core.compute_output_spec(call)


def _has_own_step(model: keras.Model) -> bool:
    return any(
        getattr(type(model), name) is not getattr(keras.Model, name)
        for name in ("train_step", "test_step")
    )


def _symbolic(specs: Any) -> Any:
    """A batch without values in the graph that is being made."""
    return tf.nest.map_structure(_placeholder, specs)


def _placeholder(spec: tf.TypeSpec | None) -> Any:
    if spec is None or isinstance(spec, tf.OptionalSpec):
        # What Keras hands on as None.
        return None
    parts = tf.nest.map_structure(
        lambda part: tf.compat.v1.placeholder(part.dtype, part.shape),
        tf.nest.flatten(spec, expand_composites=True),
    )
    return tf.nest.pack_sequence_as(spec, parts, expand_composites=True)


def _specs_of_data(iterator: Any) -> Any:
    """Specs of the batches of what iterates over an epoch."""
    dataset = iterator._distributed_dataset
    return dataset.batch_spec if isinstance(dataset, MeshDataset) else dataset.element_spec


def _specs_of_batch(batch: Any) -> Any:
    return tf.nest.map_structure(
        lambda x: x if x is None else tf.type_spec_from_value(_as_value(x)), batch
    )


def _as_value(x: Any) -> Any:
    """A value whose type TensorFlow knows: numbers and lists of them are arrays."""
    return x if tf.is_tensor(x) else np.asarray(x)
