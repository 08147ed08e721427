"""Models on one device: their parameters, their architecture, saving, and their layout tables."""

import dataclasses
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.config import GPTConfig, LlamaConfig
from llmos_tf.models import GPT, PRESETS, Llama
from llmos_tf.models.layouts import gpt_layouts, llama_layouts

SMALL_GPT = GPTConfig(vocab_size=50, max_positions=8, hidden_size=12, num_heads=3, num_layers=2)
SMALL_LLAMA = LlamaConfig(
    vocab_size=50,
    max_positions=8,
    hidden_size=12,
    num_heads=4,
    num_kv_heads=2,
    num_layers=2,
    feed_forward_size=20,
    head_dim=6,
)
CONFIGS = {
    "gpt": SMALL_GPT,
    "gpt feed-forward": dataclasses.replace(SMALL_GPT, feed_forward_size=10, dropout=0.1),
    "llama": SMALL_LLAMA,
    "llama tied": dataclasses.replace(SMALL_LLAMA, tie_embeddings=True, activation="gelu"),
    "llama without groups": dataclasses.replace(SMALL_LLAMA, num_kv_heads=4),
    **{name: PRESETS[name] for name in ("gpt_tiny", "gpt_mini", "llama_tiny", "gpt2_small")},
}


def make(config):
    return (GPT if isinstance(config, GPTConfig) else Llama)(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_counts_the_built_models_parameters(name):
    """Fails if the formula or the model lacks a bias, a norm or an embedding."""
    model = make(CONFIGS[name])
    built = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert model.num_parameters() == CONFIGS[name].num_parameters() == built


@pytest.mark.parametrize("config", [SMALL_GPT, SMALL_LLAMA], ids=["gpt", "llama"])
def test_a_token_does_not_see_those_after_it(config):
    """Fails if the mask is missing, off by one, or a token sees its successor."""
    model = make(config)
    tokens = np.arange(8)[np.newaxis] % 50
    changed = tokens.copy()
    changed[0, 5] = 49
    before, after = model(tokens), model(changed)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("config", [SMALL_GPT, SMALL_LLAMA], ids=["gpt", "llama"])
def test_positions_matter(config):
    """Fails if learned positions are not added, or rotary ones do not turn the keys."""
    model = make(config)
    one, other = model(np.array([[1, 2, 3, 4]])), model(np.array([[2, 1, 3, 4]]))
    # The last token sees the same set of tokens, in another order.
    assert not np.allclose(one[0, -1], other[0, -1])


@pytest.mark.parametrize("config", [SMALL_GPT, SMALL_LLAMA], ids=["gpt", "llama"])
def test_saved_and_loaded(config, tmp_path):
    """Fails if the configuration or a weight is lost in a .keras file."""
    model = make(config)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.config == config
    tokens = tf.constant([[3, 1, 4, 1]])
    np.testing.assert_array_equal(model(tokens), loaded(tokens))


def test_every_layout_rule_matches_a_variable_once():
    """Fails for a rule of a renamed variable, or two rules for one."""
    for config in (SMALL_GPT, SMALL_LLAMA, CONFIGS["llama without groups"], CONFIGS["llama tied"]):
        table = gpt_layouts(config) if isinstance(config, GPTConfig) else llama_layouts(config, 2)
        shapes = {v.path: v.shape for v in make(config).trainable_variables}
        matched = {pattern: [p for p in shapes if re.fullmatch(pattern, p)] for pattern in table}
        assert all(matched.values()), matched
        paths = [path for found in matched.values() for path in found]
        assert len(paths) == len(set(paths))
        for pattern, found in matched.items():
            dims = getattr(table[pattern], "dims", table[pattern])
            assert all(len(shapes[path]) == len(dims) for path in found), pattern


def test_presets_by_name():
    """Fails if a preset of the other architecture is built, or a wrong name gets no near ones."""
    assert GPT.from_preset("gpt_tiny").config == PRESETS["gpt_tiny"]
    with pytest.raises(ValueError, match=r"gpt_tinny.*gpt_tiny"):
        GPT.from_preset("gpt_tinny")
    with pytest.raises(
        ValueError, match=r"llama_tiny.*is a LlamaConfig; GPT takes one of gpt_tiny"
    ):
        GPT.from_preset("llama_tiny")
    with pytest.raises(ValueError, match=r"GPT takes a GPTConfig\. Received: LlamaConfig"):
        GPT(SMALL_LLAMA)
