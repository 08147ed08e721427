"""Blocks of one kind, of which language models and many others are stacks."""

import math
from typing import Any

import keras


def is_stack(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer is mostly blocks of one kind, as an encoder that is no model is.

    Args:
        layer: a built layer.

    Returns:
        Whether two blocks at least have more than 3/4 of its weights.
    """
    blocks = repeated_blocks(layer)
    # Not half: of a decoder's block that much is attention, to itself and to an encoder.
    return bool(blocks) and _num_elements(blocks) > 0.75 * _num_elements([layer])


def repeated_blocks(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers of one class in a layer, itself made of layers, that weigh most.

    Args:
        layer: a built layer or model.

    Returns:
        Two at least, or none.
    """
    by_class: dict[type, list[Any]] = {}
    for part in layer._layers:
        if part.weights and any(inner.weights for inner in part._layers):
            by_class.setdefault(type(part), []).append(part)
    largest = max(by_class.values(), key=_num_elements, default=[])
    return largest if len(largest) > 1 else []


def recomputed_blocks(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the blocks of all stacks in a model: those that are computed again one by one.

    Args:
        model: a built model or layer.

    Returns:
        The blocks, of the model and of models and stacks in it; none where nothing is repeated.
    """
    parts = [part for part in model._layers if any(inner.weights for inner in part._layers)]
    blocks = repeated_blocks(model)
    # In a model of one large part and some small ones alike, the large one counts.
    if _num_elements(blocks) <= 0.5 * _num_elements(parts):
        blocks = []
    known = {id(block) for block in blocks}
    for part in parts:
        if id(part) not in known and (isinstance(part, keras.Model) or is_stack(part)):
            blocks = [*blocks, *recomputed_blocks(part)]
    return blocks


def _num_elements(layers: list[Any]) -> int:
    return sum(math.prod(weight.shape) for layer in layers for weight in layer.weights)
