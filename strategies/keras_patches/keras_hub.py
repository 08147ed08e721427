"""How the backbones of KerasHub lie over a `tensor` axis.

KerasHub's models know nothing of this package, so their layouts are announced for them, when one is
made under a strategy's scope: the family's own `get_layout_map` where it has one, else a table of
this file. KerasHub is not imported here; a model of it shows by its class.
"""

import functools
from collections.abc import Mapping
from typing import Any

import keras

from llmos_tf.sharding import announce_layouts, mesh_axis_size

# [hidden, vocabulary], where it is not the transposed input table. KerasHub's maps forget it.
_OUTPUT_TABLE = "token_embedding/reverse_embeddings"

# Column then row: the first product of a pair is cut along its outputs, the second along its
# inputs. Where the axis does not divide heads or vocabulary, the variable is cut in storage alone.
_EMBEDDINGS = {
    # [vocabulary, hidden]
    "token_embedding/embeddings": ("tensor", None),
}
_ATTENTION = {
    # [hidden, heads, head_dim]
    r"transformer_layer_\d+/self_attention/(query|key|value)/kernel": (None, "tensor", None),
    # [heads, head_dim, hidden]
    r"transformer_layer_\d+/self_attention/attention_output/kernel": ("tensor", None, None),
}
_FEED_FORWARD = {
    # [hidden, feed_forward]
    r"transformer_layer_\d+/feedforward_intermediate_dense/kernel": (None, "tensor"),
    # [feed_forward, hidden]
    r"transformer_layer_\d+/feedforward_output_dense/kernel": ("tensor", None),
}
_TABLES: dict[str, Mapping[str, tuple[str | None, ...]]] = {
    "GPT2Backbone": {
        **_EMBEDDINGS,
        **_ATTENTION,
        # [heads, head_dim]
        r"transformer_layer_\d+/self_attention/(query|key|value)/bias": ("tensor", None),
        **_FEED_FORWARD,
        # [feed_forward]
        r"transformer_layer_\d+/feedforward_intermediate_dense/bias": ("tensor",),
    },
    "MistralBackbone": {
        **_EMBEDDINGS,
        _OUTPUT_TABLE: (None, "tensor"),
        **_ATTENTION,
        **_FEED_FORWARD,
        # [hidden, feed_forward]
        r"transformer_layer_\d+/feedforward_gate_dense/kernel": (None, "tensor"),
    },
}


@functools.cache
def hook_keras_hub() -> None:
    """Has the layouts of a KerasHub backbone announced before its variables are made, from now on.

    A backbone makes them in its constructor, with no name of its own in their paths.
    """
    original = keras.Model.__new__

    @functools.wraps(original)
    def __new__(cls, *args, **kwargs):
        if mesh_axis_size("tensor") > 1:
            announce_layouts(keras_hub_layouts(cls), strict=False)
        return original(cls, *args, **kwargs)

    keras.Model.__new__ = staticmethod(__new__)


def keras_hub_layouts(model_class: type) -> Mapping[str, Any]:
    """Returns the layouts of a class of models.

    Args:
        model_class: a backbone of KerasHub, a subclass of one, or any other class.

    Returns:
        `keras.distribution.LayoutMap`, or path pattern to axes; empty for what is no backbone of
        KerasHub, and for families without layouts.
    """
    names = [
        kind.__name__
        for kind in model_class.__mro__
        if kind.__module__.partition(".")[0] == "keras_hub"
    ]
    if "Backbone" not in names:
        return {}
    if hasattr(model_class, "get_layout_map"):
        # Only the names of its axes matter (`LayoutRules`).
        mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
        layout_map = model_class.get_layout_map(mesh)
        if layout_map[_OUTPUT_TABLE] is None:
            layout_map[_OUTPUT_TABLE] = (None, "model")
        return layout_map
    return next((_TABLES[name] for name in names if name in _TABLES), {})
