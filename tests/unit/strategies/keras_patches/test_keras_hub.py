"""Layouts of KerasHub's backbones are found by their class, when one is made in a scope."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh
from llmos_tf.sharding import Layout, LayoutRules
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.keras_patches.keras_hub import keras_hub_layouts

if sys.version_info < (3, 11):
    pytest.skip("KerasHub 0.32 needs Python 3.11.", allow_module_level=True)

import keras_hub

pytestmark = pytest.mark.fast

LENGTH = 4
SIZES = {"vocabulary_size": 8, "num_layers": 1, "hidden_dim": 8, "intermediate_dim": 8}
GROUPED = {**SIZES, "num_query_heads": 2, "num_key_value_heads": 2}


def gpt2():
    return keras_hub.models.GPT2Backbone(**SIZES, num_heads=2, max_sequence_length=LENGTH)


def llama():
    return keras_hub.models.LlamaBackbone(**GROUPED)


def mistral():
    return keras_hub.models.MistralBackbone(**GROUPED)


def dims(backbone):
    return {v.path: v.value.layout.dims for v in backbone.weights}


class Own(keras_hub.models.GPT2Backbone):
    """A user's subclass, with arguments of its own."""

    def __init__(self):
        super().__init__(**SIZES, num_heads=2, max_sequence_length=LENGTH)


class Backbone(keras.Model):
    """A base class of the user's."""


class GPT2Backbone(Backbone):
    """A model of the user's that only has the names of KerasHub's."""


def test_the_class_tells_the_layouts():
    """Fails if a subclass loses its family's layouts, if a model that is no backbone gets some, or
    if Llama's second table, of which KerasHub's map says nothing, stays whole."""
    models = keras_hub.models
    assert keras_hub_layouts(Own) == keras_hub_layouts(models.GPT2Backbone) != {}
    for other in (GPT2Backbone, models.GPT2CausalLM, models.OPTBackbone, keras.Sequential):
        assert keras_hub_layouts(other) == {}
    layout_map = keras_hub_layouts(models.LlamaBackbone)
    assert layout_map["token_embedding/reverse_embeddings"].axes == (None, "model")
    assert layout_map["transformer_layer_0/self_attention/key/kernel"].axes[0] == "model"


def test_two_families_in_one_scope():
    """Fails if a family's variables get the layouts of another one, whose paths are the same, or if
    a rule of another one that matches too is an error."""
    makes = [llama, gpt2, mistral, Own]
    alone, together = [], []
    for make in makes:
        with MeshStrategy(Mesh(tensor=2)).scope():
            alone.append(dims(make()))
    strategy = MeshStrategy(Mesh(tensor=2))
    with strategy.scope():
        together = [dims(make()) for make in makes]
    assert together == alone
    assert alone[0] != alone[2]
    strategy.run(lambda: tf.ones(()))


def test_a_family_without_layouts():
    """Fails if the error for an idle tensor axis does not name what would have layouts."""
    named = "a KerasHub backbone with a get_layout_map"
    with pytest.raises(ValueError, match=named), MeshStrategy(Mesh(tensor=2)).scope():
        keras_hub.models.OPTBackbone(**SIZES, num_heads=2, max_sequence_length=LENGTH)


def test_without_a_tensor_axis_there_are_no_rules():
    """Fails if a KerasHub whose paths have changed is an error where no layout is needed."""
    strategy = MeshStrategy(Mesh(fsdp=2))
    with strategy.scope():
        backbone = gpt2()
    assert all(axis is None for axes in dims(backbone).values() for axis in axes)
    assert not strategy.extended.layout_rules._rules


def test_the_users_map_replaces_the_familys():
    """Fails if a family's layouts act beside those of a `layout_map`."""
    table = {".*/query/kernel": (None, "tensor", None)}
    with MeshStrategy(Mesh(tensor=2), layout_map=table).scope():
        cut = {path for path, axes in dims(gpt2()).items() if "tensor" in axes}
    assert cut == {"transformer_layer_0/self_attention/query/kernel"}


def test_the_table_announced_last_goes_first():
    """Fails if the rule of a model made before keeps its place for the same pattern."""
    rules = LayoutRules(Mesh(tensor=2))
    rules.add_model_table({"(a|b)": ("tensor", None), "c": ("tensor",)})
    rules.add_model_table({"(a|b)": (None, "tensor"), ".*c": (None,)})
    assert [rules.find(path, (2, 2), True).dims for path in "ab"] == [(None, "tensor")] * 2
    assert rules.find("/c", (2,), True).dims == (None,)


def test_rules_that_are_not_strict():
    """Fails if a rule for what a model may lack has to match, if an axis has to divide, or if such
    rules that match nothing pass for the layouts of a tensor axis."""
    rules = LayoutRules(Mesh(tensor=2))
    rules.add_model_table({"a": ("tensor",), "b": ("tensor",)}, strict=False)
    rules.find("c", (3,), True)
    with pytest.raises(ValueError, match="no layout says"):
        rules.check_all_used()
    assert rules.find("a", (3,), True) == Layout(("tensor",), uneven=True)
    rules.check_all_used()


def test_cached_attention_in_a_program():
    """Fails if attention with a cache, which has all heads, computes with the rank's own, or if
    attention without one does not."""
    strategy = MeshStrategy(Mesh(tensor=2))
    with strategy.scope():
        attention = gpt2().get_layer("transformer_layer_0")._self_attention_layer
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 2, 8)), tf.float32)
    cache = tf.constant(rng.normal(size=(2, 2, LENGTH, 2, 4)), tf.float32)
    heads = set()

    def attend():
        alone = attention(x, x)
        for op in tf.compat.v1.get_default_graph().get_operations():
            # Scores of [rows, heads, positions, head_dim], and their product with the values.
            if op.type == "BatchMatMulV2" and op.inputs[0].shape.rank == 4:
                heads.add(op.inputs[0].shape[1])
        return alone, attention(x, x, cache=cache, cache_update_index=1)

    expected = attention(x, x), attention(x, x, cache=cache, cache_update_index=1)
    result = strategy.run(attend)
    first = tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], result)
    for one, other in zip(tf.nest.flatten(first), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert heads == {1}
