"""Configurations: what they refuse, what they count, and that they survive a file."""

import doctest
import inspect
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf import config as config_module
from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig, ModelConfig

pytestmark = pytest.mark.fast

GPT = GPTConfig(vocab_size=11, max_positions=6, hidden_size=8, num_heads=2, num_layers=3)
LLAMA = LlamaConfig(
    vocab_size=11,
    max_positions=6,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    num_layers=3,
    feed_forward_size=10,
)

MIXTRAL = MixtralConfig(
    **{k: v for k, v in LLAMA.to_dict().items() if k != "architecture"},
    num_experts=4,
    num_experts_per_token=2,
)

small = st.integers(1, 9)
rates = st.floats(0, 1, exclude_max=True)
positive = st.floats(1e-9, 1e9)


@st.composite
def gpt_configs(draw) -> GPTConfig:
    heads = draw(small)
    return GPTConfig(
        vocab_size=draw(small),
        max_positions=draw(small),
        hidden_size=heads * draw(small),
        num_heads=heads,
        num_layers=draw(small),
        feed_forward_size=draw(st.none() | small),
        dropout=draw(rates),
        layer_norm_epsilon=draw(positive),
    )


@st.composite
def llama_configs(draw) -> LlamaConfig:
    kv_heads = draw(small)
    heads = kv_heads * draw(small)
    return LlamaConfig(
        vocab_size=draw(small),
        max_positions=draw(small),
        hidden_size=heads * 2 * draw(small),
        num_heads=heads,
        num_kv_heads=draw(st.just(kv_heads) | st.none()),
        num_layers=draw(small),
        feed_forward_size=draw(small),
        head_dim=draw(st.none() | small.map(lambda half: 2 * half)),
        rope_theta=draw(positive),
        rms_norm_epsilon=draw(positive),
        tie_embeddings=draw(st.booleans()),
        activation=draw(st.sampled_from(["silu", "gelu"])),
        dropout=draw(rates),
    )


@st.composite
def mixtral_configs(draw) -> MixtralConfig:
    fields_of_llama = draw(llama_configs()).to_dict()
    del fields_of_llama["architecture"]
    per_token = draw(small)
    return MixtralConfig(
        **fields_of_llama,
        num_experts=per_token + draw(st.integers(0, 5)),
        num_experts_per_token=per_token,
        capacity_factor=draw(st.none() | positive),
        load_balance_weight=draw(st.just(0.0) | positive),
        router_z_weight=draw(st.just(0.0) | positive),
    )


configs = gpt_configs() | llama_configs() | mixtral_configs()
# A busy machine is not a bug: no deadline.
relaxed = settings(deadline=None)


def weight_shapes(config: ModelConfig, num_experts: int | None = None) -> list[tuple[int, ...]]:
    """The weights written out one by one: the count's other derivation.

    Of a mixture all experts, or the first `num_experts`.
    """
    h = config.hidden_size
    f = config.feed_forward_size
    if isinstance(config, GPTConfig):
        norm = [(h,), (h,)]
        shapes = [(config.vocab_size, h), (config.max_positions, h), *norm]
        for _ in range(config.num_layers):
            shapes += [*norm, (h, 3 * h), (3 * h,), (h, h), (h,)]
            shapes += [*norm, (h, f), (f,), (f, h), (h,)]
        return shapes
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    shapes = [(config.vocab_size, h), (h,)]
    if not config.tie_embeddings:
        shapes.append((h, config.vocab_size))
    for _ in range(config.num_layers):
        shapes += [(h,), (h, queries), (h, keys), (h, keys), (queries, h)]
        shapes.append((h,))
        if isinstance(config, MixtralConfig):
            shapes.append((h, config.num_experts))
        for _ in range(num_experts or getattr(config, "num_experts", 1)):
            shapes += [(h, f), (h, f), (f, h)]
    return shapes


def size(shape: tuple[int, ...]) -> int:
    total = 1
    for dim in shape:
        total *= dim
    return total


@relaxed
@given(configs)
def test_count_is_the_sum_of_the_weights(config):
    # Fails when the formula forgets a bias or a norm, counts a tied projection twice, or takes
    # hidden_size where num_heads * head_dim or the key-value heads are meant.
    assert config.num_parameters() == sum(size(shape) for shape in weight_shapes(config))


@relaxed
@given(configs)
def test_matmul_parameters_are_the_kernels(config):
    # Fails when an embedding look-up or a bias is counted as a product, the output projection is
    # left out because it is tied, or experts that a token is not sent to are counted.
    active = getattr(config, "num_experts_per_token", None)
    kernels = [shape for shape in weight_shapes(config, active) if len(shape) == 2]
    lookups = config.vocab_size if not getattr(config, "tie_embeddings", True) else 0
    if isinstance(config, GPTConfig):
        lookups += config.max_positions
    expected = sum(size(shape) for shape in kernels) - lookups * config.hidden_size
    assert config.num_matmul_parameters() == expected


@relaxed
@given(mixtral_configs())
def test_active_parameters_are_what_a_token_meets(config):
    # Fails when a router is forgotten, or idle experts are counted as active.
    active = weight_shapes(config, config.num_experts_per_token)
    assert config.num_active_parameters() == sum(size(shape) for shape in active)


@relaxed
@given(configs)
def test_dictionary_round_trip(config):
    # Fails when a field is lost on the way, or the architecture is not read.
    data = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(data) == config
    assert type(config).from_dict(data) == config
    del data["architecture"]
    assert type(config).from_dict(data) == config


@pytest.mark.parametrize("sequence_length", [1, 512, 1024])
def test_gpt_flops_are_those_of_narayanan(sequence_length):
    # Fails when the backward pass, the attention scores or the logits are counted wrongly.
    # arXiv 2104.04473: 96·l·h²(1 + s/6h + V/16lh) a token with recomputation; without the second
    # forward pass of the blocks, 24·l·h² + 4·l·h·s, it is 72·l·h²(1 + s/6h + V/12lh).
    h, layers, vocab = 768, 12, 50257
    config = GPTConfig(
        vocab_size=vocab, max_positions=1024, hidden_size=h, num_heads=12, num_layers=layers
    )
    s = sequence_length
    with_recomputation = 96 * layers * h * h * (1 + s / (6 * h) + vocab / (16 * layers * h))
    expected = with_recomputation - layers * (24 * h * h + 4 * h * s)
    assert config.flops_per_token(s) == pytest.approx(expected, rel=1e-12)


def test_llama_flops_use_the_width_of_the_heads():
    # Fails when attention is counted at the hidden size though head_dim makes it wider, or with
    # the number of key-value heads: every query head scores every key.
    wide = replace(LLAMA, head_dim=6)
    extra = wide.flops_per_token(5) - 6 * wide.num_matmul_parameters()
    assert extra == 12 * 3 * (4 * 6) * 5


@pytest.mark.parametrize("length", [0, 7, -1, 2.0, True])
def test_flops_refuse_a_length_outside_the_model(length):
    # Fails when a length that the model cannot take gets a plausible number.
    with pytest.raises(ValueError, match=f"Received: sequence_length={length}"):
        GPT.flops_per_token(length)


def test_defaults_are_resolved():
    # Fails when a layer would read None, or a default is not the documented one.
    assert GPT.feed_forward_size == 32
    assert GPT.head_dim == 4
    plain = replace(LLAMA, num_kv_heads=None, head_dim=None)
    assert (plain.num_kv_heads, plain.head_dim) == (4, 2)


@pytest.mark.parametrize("config", [GPT, LLAMA, MIXTRAL], ids=["gpt", "llama", "mixtral"])
def test_frozen_and_keyword_only(config):
    # Fails when a configuration can change after its checks, or takes sizes by position, where a
    # swap of two integers goes unseen.
    with pytest.raises(FrozenInstanceError):
        config.num_heads = 1
    with pytest.raises(TypeError, match="positional"):
        type(config)(11, 6, 8, 2, 3)
    assert hash(config) == hash(replace(config))


SIZES = ["vocab_size", "max_positions", "hidden_size", "num_heads", "num_layers"]
BAD_VALUES = [
    *[(config, name, bad) for config in (GPT, LLAMA) for name in SIZES for bad in (0, 2.0, True)],
    *[(config, "feed_forward_size", bad) for config in (GPT, LLAMA) for bad in (0, -3, "32")],
    *[(config, "dropout", bad) for config in (GPT, LLAMA) for bad in (1.0, -0.1, "0.1", True)],
    (GPT, "dropout", float("nan")),
    (GPT, "vocab_size", None),
    (GPT, "num_heads", 3),
    (GPT, "layer_norm_epsilon", 0.0),
    (GPT, "layer_norm_epsilon", float("nan")),
    (GPT, "layer_norm_epsilon", 10**400),
    (LLAMA, "num_kv_heads", 3),
    (LLAMA, "num_kv_heads", 0),
    (LLAMA, "head_dim", 3),
    (LLAMA, "head_dim", 0),
    (LLAMA, "rope_theta", -1.0),
    (LLAMA, "rope_theta", float("inf")),
    (LLAMA, "rms_norm_epsilon", 0),
    (LLAMA, "tie_embeddings", 1),
    (LLAMA, "activation", "relu"),
    *[(MIXTRAL, "num_experts", bad) for bad in (0, 2.0, 1)],
    *[(MIXTRAL, "num_experts_per_token", bad) for bad in (0, 5, True)],
    *[(MIXTRAL, "capacity_factor", bad) for bad in (0, -1.0, "1", float("inf"), 10**400)],
    *[(MIXTRAL, "load_balance_weight", bad) for bad in (-0.1, None, float("nan"), 10**400)],
    (MIXTRAL, "router_z_weight", -1),
    (MIXTRAL, "num_kv_heads", 3),
]


@pytest.mark.parametrize(("config", "name", "bad"), BAD_VALUES)
def test_bad_value_is_refused_and_echoed(config, name, bad):
    # Fails when a check is missing, or its message does not say which value of which field.
    with pytest.raises(ValueError) as caught:
        replace(config, **{name: bad})
    assert f"{name}={bad!r}" in str(caught.value)


def test_heads_that_do_not_divide_the_hidden_size():
    # Fails when head_dim is rounded down without a word. With head_dim given it is legal (LaMDA).
    with pytest.raises(ValueError, match="hidden_size=10, num_heads=4"):
        replace(LLAMA, hidden_size=10, head_dim=None)
    assert replace(LLAMA, hidden_size=10, head_dim=4).attention_width() == 16


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (ModelConfig, {"architecture": "rnn"}, "gpt, llama, mixtral. Received: architecture='rnn'"),
        (ModelConfig, {"architecture": None}, "Received: architecture=None"),
        (ModelConfig, {"architecture": ["gpt"]}, r"Received: architecture=\['gpt'\]"),
        (LlamaConfig, {}, "LlamaConfig reads the architectures llama. .*'gpt'"),
        (LlamaConfig, {"architecture": "mixtral"}, "Received: architecture='mixtral'"),
        (GPTConfig, {"num_head": 2}, "Received also: 'num_head'"),
        (GPTConfig, {"rope_theta": 1e4}, "Received also: 'rope_theta'"),
    ],
)
def test_dictionary_of_something_else(cls, change, message):
    # Fails when a misspelt field is dropped, or one architecture is read as another.
    with pytest.raises(ValueError, match=message):
        cls.from_dict({**GPT.to_dict(), **change})


def test_dictionary_that_is_not_complete():
    # Fails when a missing field is a TypeError of Python's, which scripts do not catch.
    with pytest.raises(ValueError, match="needs the fields hidden_size, num_layers as well"):
        GPTConfig.from_dict({"vocab_size": 8, "max_positions": 8, "num_heads": 2})
    with pytest.raises(ValueError, match="architecture=None"):
        ModelConfig.from_dict({})
    with pytest.raises(ValueError, match="is a mapping"):
        ModelConfig.from_dict(["gpt"])


def test_every_field_is_documented():
    # Fails when a field is added and its meaning is not written down.
    for cls in (GPTConfig, LlamaConfig, MixtralConfig):
        for field in fields(cls):
            assert f"\n    {field.name}: " in inspect.getdoc(cls)


def test_examples():
    # Fails when an example in a docstring no longer gives what it says.
    results = doctest.testmod(config_module)
    assert (results.failed, results.attempted > 0) == (0, True)


def test_no_tensorflow():
    # Fails when a configuration, a preset or the package itself starts to import TensorFlow:
    # planning would be slow, and virtual devices could no longer be configured after the import.
    code = (
        "import sys, llmos_tf, llmos_tf.config, llmos_tf.models.presets\n"
        "llmos_tf.models.get_preset('gpt_tiny').num_parameters()\n"
        "llmos_tf.Mesh(data=2)\n"
        "sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
