"""What a script gives to Keras, as strings that processes compare."""

import json
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

# Of a longer list each entry is a row and not an array.
_PARTS = 32
# Of a configuration: names, which count the layers that a process has made, and numbers of objects.
_OWN = ("name", "shared_object_id", "registered_name")


def data_facts(name: str, data: Any) -> dict[str, str]:
    """Returns what is known of data before they are read.

    Args:
        name: of the argument.
        data: arrays, a dataset, a generator or the like, nested in tuples, lists or dicts.

    Returns:
        For each part its type, and as far as it is known shape and number of batches.
    """
    if isinstance(data, tf.data.Dataset):
        count = int(data.cardinality())
        known = {-1: "no end", -2: "an unknown number of"}.get(count, count)
        return {name: f"dataset of {known} batches of {data.element_spec}"}
    if isinstance(data, keras.utils.PyDataset):
        return {name: f"{type(data).__name__} of {data.num_batches} batches"}
    if isinstance(data, Mapping):
        parts = [(f"{name}[{key!r}]", part) for key, part in sorted(data.items(), key=str)]
    elif isinstance(data, list | tuple) and len(data) <= _PARTS:
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(data)]
    else:
        shape = getattr(data, "shape", None)
        if not shape:
            return {name: "none" if data is None else type(data).__name__}
        facts = {f"{name}, rows": str(shape[0])}
        facts[f"{name}, shape and dtype of a row"] = f"{list(shape[1:])} {_dtype(data)}"
        return facts
    return {key: value for label, part in parts for key, value in data_facts(label, part).items()}


def model_facts(model: keras.Model) -> dict[str, str]:
    """Returns the configuration of a compiled model.

    Args:
        model: the model.

    Returns:
        Of optimizer, loss and each layer; of a layer that has no configuration its class. What the
        traced program shows is compared when it is traced.
    """
    facts = {"loss": _text(_serialized(model.loss))}
    facts |= _facts_of("optimizer", model.optimizer)
    facts["steps_per_execution"] = str(model.steps_per_execution)
    facts["run_eagerly"] = str(model.run_eagerly)
    for i, layer in enumerate(model._flatten_layers(include_self=False)):
        facts |= _facts_of(f"layer {i}", layer)
    return facts


def _facts_of(label: str, thing: Any) -> dict[str, str]:
    facts = {label: type(thing).__name__}
    if thing is None or isinstance(thing, keras.Model):
        # Of a model its layers are looked at.
        return facts
    try:
        config = thing.get_config()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # A class of the user's own need not have one.
        return facts
    label = f"{label} ({type(thing).__name__})"
    return facts | {
        f"{label}, {key}": _text(_serialized(value))
        for key, value in config.items()
        if key not in _OWN
    }


def _serialized(value: Any) -> Any:
    try:
        return keras.saving.serialize_keras_object(value)
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        # As above.
        return type(value).__name__


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(_shared(value), default=str)


def _shared(value: Any) -> Any:
    """A configuration without what may differ between processes."""
    if isinstance(value, Mapping):
        is_layer = "trainable" in value or "class_name" in value
        return {key: _shared(part) for key, part in value.items() if not (is_layer and key in _OWN)}
    if isinstance(value, list | tuple):
        return [_shared(part) for part in value]
    return value


def _dtype(data: Any) -> str:
    dtype = getattr(data, "dtype", None)
    return "" if dtype is None else getattr(dtype, "name", str(dtype))
