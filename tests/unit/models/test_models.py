"""GPT and Llama on one device: their arithmetic, their sizes, what is saved of them."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh
from llmos_tf.models import GPT, GPTConfig, Llama, LlamaConfig
from llmos_tf.models.layouts import gpt_layouts, llama_layouts
from llmos_tf.sharding import Layout
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

SIZES = {"vocab_size": 30, "max_positions": 8, "hidden_size": 16, "num_heads": 4, "num_layers": 2}
GPT_TINY = GPTConfig(**SIZES, feed_forward_size=20)
GROUPED = LlamaConfig(**SIZES, num_kv_heads=2, feed_forward_size=24)
LLAMAS = {
    "grouped": GROUPED,
    "heads": LlamaConfig(**SIZES, feed_forward_size=24),
    "tied": LlamaConfig(**SIZES, num_kv_heads=1, feed_forward_size=24, tie_embeddings=True),
    "head_dim": LlamaConfig(
        **SIZES, num_kv_heads=2, feed_forward_size=24, head_dim=6, activation="gelu"
    ),
}


def make(config):
    keras.utils.set_random_seed(0)
    return (GPT if isinstance(config, GPTConfig) else Llama)(config)


def tokens_for(config, rows=2):
    rng = np.random.default_rng(0)
    return rng.integers(0, config.vocab_size, (rows, config.max_positions)).astype("int32")


def with_random_weights(model):
    """Zeros and ones would hide a bias or a scale that is left out."""
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape) * 0.3 for w in model.weights])
    return model


@pytest.mark.parametrize("preset", ["gpt_tiny", "gpt_mini", "llama_tiny", "gpt2_small"])
def test_presets_have_as_many_weights_as_their_formula_says(preset):
    """Fails if the formula or the model forgets a weight, or counts one twice."""
    model = (GPT if preset.startswith("gpt") else Llama).from_preset(preset)
    assert model.num_parameters() == sum(w.shape.num_elements() for w in model.weights)


@pytest.mark.parametrize("config", [GPT_TINY, *LLAMAS.values()], ids=["gpt", *LLAMAS])
def test_counts_of_weights(config):
    """Fails if a formula takes a head's width for hidden / heads, the feed-forward width for four
    times the hidden one, or a tied table for two; or if the FLOPs leave a product out."""
    model = make(config)
    sizes = {w.path: w.shape.num_elements() for w in model.weights}
    assert config.num_parameters() == sum(sizes.values())
    products = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    # The output layer is a product too.
    products += config.vocab_size * config.hidden_size
    assert config.num_matmul_parameters() == products
    length = config.max_positions
    # Scores and weighted sums: 2 products of 2 · length · width FLOPs, and twice that backward.
    attention = 3 * 2 * 2 * length * config.attention_width() * config.num_layers
    assert config.flops_per_token(length) == 6 * products + attention


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attend(q, k, v):
    """Causal attention, [B, T, N, H]."""
    length, size = q.shape[1], q.shape[3]
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(size)
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -1e30)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)


def gpt_logits(weights, tokens):
    """GPT-2 (Radford et al. 2019), from a dict of weights by path."""

    def norm(x, name):
        centered = x - x.mean(-1, keepdims=True)
        normed = centered / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return normed * weights[f"{name}/gamma"] + weights[f"{name}/beta"]

    x = weights["token_embedding/table"][tokens]
    x = x + weights["position_embedding/table"][: tokens.shape[1]]
    for i in range(SIZES["num_layers"]):
        at = f"block_{i}/attention"
        y = norm(x, f"{at}_norm")
        qkv = np.einsum("btd,dcnh->cbtnh", y, weights[f"{at}/query_key_value/kernel"])
        qkv += weights[f"{at}/query_key_value/bias"][:, np.newaxis, np.newaxis]
        y = np.einsum("btnh,nhd->btd", attend(*qkv), weights[f"{at}/output/kernel"])
        x = x + y + weights[f"{at}/output/bias"]
        at = f"block_{i}/feed_forward"
        y = norm(x, f"{at}_norm")
        y = gelu(y @ weights[f"{at}/up/kernel"] + weights[f"{at}/up/bias"])
        x = x + y @ weights[f"{at}/down/kernel"] + weights[f"{at}/down/bias"]
    return norm(x, "final_norm") @ weights["token_embedding/table"].T


def llama_logits(weights, tokens):
    """Llama with grouped heads (arXiv 2302.13971, 2307.09288), from a dict of weights by path."""

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}/scale"]

    def turned(x):
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[1])[:, np.newaxis] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, np.newaxis], np.sin(angles)[:, np.newaxis]
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = weights["token_embedding/table"][tokens]
    for i in range(SIZES["num_layers"]):
        at = f"block_{i}/attention"
        y = norm(x, f"{at}_norm")
        q = np.einsum("btd,dnh->btnh", y, weights[f"{at}/query/kernel"])
        kv = np.einsum("btd,dckh->cbtkh", y, weights[f"{at}/key_value/kernel"])
        k, v = np.repeat(kv, q.shape[2] // kv.shape[3], axis=3)
        y = attend(turned(q), turned(k), v)
        x = x + np.einsum("btnh,nhd->btd", y, weights[f"{at}/output/kernel"])
        at = f"block_{i}/feed_forward"
        gate, up = np.einsum("btd,dcf->cbtf", norm(x, f"{at}_norm"), weights[f"{at}/up/kernel"])
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{at}/down/kernel"]
    return norm(x, "final_norm") @ weights["output_embedding/table"].T


@pytest.mark.parametrize(
    ("config", "formula"), [(GPT_TINY, gpt_logits), (GROUPED, llama_logits)], ids=["gpt", "llama"]
)
def test_logits_are_those_of_the_published_architecture(float64, config, formula):
    """Fails if a norm, residual, bias, position or activation is another, or in another place."""
    model = with_random_weights(make(config))
    weights = {w.path.split("/", 1)[1]: w.numpy() for w in model.weights}
    tokens = tokens_for(config)
    np.testing.assert_allclose(model(tokens), formula(weights, tokens), atol=1e-10)


def test_initial_weights_of_gpt():
    """Fails if the residual products do not begin smaller by sqrt(2 · layers), or the others are
    not spread by 0.02. A spread of n weights is known to 1 / sqrt(2 n), here a hundredth."""
    model = GPT.from_preset("gpt_tiny")
    block = model.blocks[0]
    for kernel, expected in [
        (block.attention.query_key_value.kernel, 0.02),
        (block.attention.output_product.kernel, 0.02 / np.sqrt(8)),
        (block.feed_forward.up.kernel, 0.02),
        (block.feed_forward.down.kernel, 0.02 / np.sqrt(8)),
        (model.token_embedding.table, 0.02),
    ]:
        assert np.std(kernel.numpy()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("config", [GPT_TINY, LLAMAS["tied"]], ids=["gpt", "llama"])
def test_a_saved_model_is_loaded_with_its_weights(tmp_path, config):
    """Fails if the file lacks the configuration or a weight, or is read into another layer."""
    model = make(config)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (type(loaded), loaded.config, loaded.name) == (type(model), config, model.name)
    tokens = tokens_for(config)
    np.testing.assert_array_equal(loaded(tokens), model(tokens))


def test_a_model_saved_on_a_mesh_is_loaded_on_one_device(tmp_path):
    """Fails if a part of a weight is saved for the whole, or the vocabulary with its padding."""
    with MeshStrategy(Mesh(fsdp=2, tensor=4)).scope():
        model = make(GROUPED)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one, other in zip(loaded.get_weights(), make(GROUPED).get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_configuration_round_trip():
    """Fails if `from_config` loses a field or the name, by which layouts find the variables."""
    model = Llama(LLAMAS["head_dim"], name="little")
    again = Llama.from_config(model.get_config())
    assert (again.config, again.name) == (model.config, "little")
    assert [w.path for w in again.weights] == [w.path for w in model.weights]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("config", [GPT_TINY, *LLAMAS.values()], ids=["gpt", *LLAMAS])
def test_every_layout_names_a_variable_and_fits_it(config, size):
    """Fails if a variable is renamed and its layout is not, or a layout has another order of
    dimensions than the variable."""
    paths = {w.path: tuple(w.shape) for w in make(config).weights}
    table = gpt_layouts(config) if config is GPT_TINY else llama_layouts(config, size)
    cut = set()
    for pattern, axes in table.items():
        hits = [path for path in paths if re.fullmatch(pattern, path)]
        assert hits, pattern
        layout = axes if isinstance(axes, Layout) else Layout(axes)
        for path in hits:
            layout.check(path, paths[path], Mesh(tensor=size))
        cut.update(hits)
    # Whole on every rank are the small ones, and key-value heads that the axis does not divide.
    whole = ("norm", "bias", "position_embedding")
    if config is not GPT_TINY and config.num_kv_heads % size:
        whole += ("key_value/kernel",)
    assert all(any(word in path for word in whole) for path in set(paths) - cut)


@pytest.mark.parametrize("name", ["gpt_tinny", "GPT-tiny"])
def test_an_unknown_preset_names_near_ones(name):
    """Fails if the user is not told what would work."""
    with pytest.raises(ValueError, match=rf"Received: '{name}'.*gpt_tiny"):
        GPT.from_preset(name)


def test_a_preset_or_configuration_of_another_architecture_is_refused():
    """Fails if a Llama is made from a GPT's sizes, or dies on a missing field."""
    with pytest.raises(ValueError, match=r"'llama_tiny' is a LlamaConfig.*gpt_tiny, gpt_mini"):
        GPT.from_preset("llama_tiny")
    with pytest.raises(ValueError, match=r"Llama takes a LlamaConfig. Received: GPTConfig\("):
        Llama(GPT_TINY)


def test_from_preset_takes_a_name():
    """Fails if the options of `keras.Model` are swallowed: layouts and checkpoints go by names."""
    model = GPT.from_preset("gpt_tiny", name="mine")
    assert model.weights[0].path == "mine/token_embedding/table"
    assert model(tf.zeros([1, 2], tf.int32)).shape == (1, 2, 256)


def test_a_model_that_was_never_called_is_exported(tmp_path):
    """Fails if export asks for a signature or a call, takes tokens for floats, or keeps one
    length."""
    with MeshStrategy(Mesh(fsdp=2)).scope():
        model = with_random_weights(make(GPT_TINY))
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    tokens = tokens_for(GPT_TINY, rows=3)
    for tokens_BT in (tokens, tokens[:1, :5]):
        np.testing.assert_allclose(loaded.serve(tokens_BT), model(tokens_BT), atol=1e-5)
