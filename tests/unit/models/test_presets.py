"""Presets: the published sizes, and a helpful refusal of other names."""

import doctest

import pytest

from llmos_tf import models
from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig, ModelConfig
from llmos_tf.models import presets
from llmos_tf.models.presets import PRESETS, get_preset

pytestmark = pytest.mark.fast

# Exact counts of the released checkpoints.
EXACT = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "mixtral_8x7b": 46_702_792_704,
    # Ours, stated in presets.py and read by the benchmarks.
    "gpt_tiny": 842_496,
    "gpt_mini": 5_289_472,
    "llama_tiny": 803_968,
    "moe_tiny": 2_430_080,
}


@pytest.mark.parametrize("name", EXACT)
def test_published_count(name):
    # Fails when a size of a preset is wrong or the formula forgets a weight.
    assert get_preset(name).num_parameters() == EXACT[name]


def test_counts_published_in_billions():
    # Fails when a layer count, a width or the padded vocabulary of the large models is wrong.
    assert round(get_preset("gpt3_175b").num_parameters() / 1e9) == 175
    assert round(get_preset("mt_nlg_530b").num_parameters() / 1e9, 1) == 529.6
    # The LaMDA paper counts 137 billion without embeddings.
    lamda = get_preset("lamda_137b")
    embeddings = 2 * lamda.vocab_size * lamda.hidden_size
    assert round((lamda.num_parameters() - embeddings) / 1e9) == 137
    # Mixtral: "47B parameters, but only uses 13B active parameters during inference".
    assert round(get_preset("mixtral_8x7b").num_active_parameters() / 1e9) == 13


def test_every_preset_is_a_configuration_and_pinned():
    # Fails when a preset is added without a test of its count.
    in_billions = {"gpt3_175b", "mt_nlg_530b", "lamda_137b"}
    assert set(PRESETS) == set(EXACT) | in_billions
    for config in PRESETS.values():
        assert ModelConfig.from_dict(config.to_dict()) == config


def test_shapes_that_others_rely_on():
    # Fails when the benchmark's model or the laptop's mesh no longer fits the presets.
    mini = get_preset("gpt_mini")
    assert (mini.vocab_size, mini.hidden_size, mini.num_heads, mini.num_layers) == (8192, 256, 8, 4)
    assert mini.max_positions == 128
    for name in ("gpt_tiny", "gpt_mini", "llama_tiny", "moe_tiny"):
        config = get_preset(name)
        for size in (config.hidden_size, config.num_heads, config.vocab_size):
            assert size % 8 == 0
        assert config.feed_forward_size % 8 == 0
        assert config.num_layers % 4 == 0
        assert config.dropout == 0.0
    llama = get_preset("llama_tiny")
    assert llama.num_heads > llama.num_kv_heads > 1
    assert isinstance(get_preset("gpt_tiny"), GPTConfig)
    assert isinstance(llama, LlamaConfig)
    moe = get_preset("moe_tiny")
    assert isinstance(moe, MixtralConfig)
    assert moe.num_experts % 8 == 0
    assert moe.num_active_parameters() == 808_064


def test_lamda_heads_are_wider_than_its_hidden_size():
    # Fails when head_dim is taken as hidden_size / num_heads, which is half of LaMDA's 128.
    lamda = get_preset("lamda_137b")
    assert lamda.attention_width() == 2 * lamda.hidden_size
    assert lamda.activation == "gelu"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("gpt2_smal", "gpt2_small"), ("GPT2-XL", "gpt2_xl"), ("llama3_7b", "llama3_70b")],
)
def test_unknown_name_gets_the_nearest(name, nearest):
    # Fails when the message lacks what was received, the nearest names, or the full list.
    with pytest.raises(ValueError) as caught:
        get_preset(name)
    message = str(caught.value)
    assert f"Received: {name!r}" in message
    suggested = message.split("Did you mean ")[1].split("?")[0]
    assert nearest in suggested.split(" or ")
    assert message.endswith(f"The presets are {', '.join(PRESETS)}.")


def test_name_that_is_near_nothing():
    # Fails when the message suggests something at random, or an empty list.
    with pytest.raises(ValueError, match=r"Received: 'zzz'\. The presets are gpt_tiny, "):
        get_preset("zzz")


def test_presets_cannot_be_changed():
    # Fails when one user's change to the table would reach every other.
    with pytest.raises(TypeError):
        PRESETS["gpt_tiny"] = PRESETS["gpt_mini"]


def test_public_names():
    # Fails when a name leaves the package, or an unknown one is not an AttributeError.
    assert models.get_preset is get_preset
    assert {
        "GPT",
        "Llama",
        "Mixtral",
        "GPTConfig",
        "LlamaConfig",
        "MixtralConfig",
        "PRESETS",
    } <= set(dir(models))
    with pytest.raises(AttributeError, match="no attribute 'Bert'"):
        _ = models.Bert


def test_examples():
    # Fails when an example in a docstring no longer gives what it says.
    results = doctest.testmod(presets)
    assert (results.failed, results.attempted > 0) == (0, True)
