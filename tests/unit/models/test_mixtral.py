"""Mixtral on one device: its sizes, its arithmetic against Llama's, and what is saved of it."""

import dataclasses
import re

import keras
import numpy as np
import pytest

from llmos_tf import Mesh
from llmos_tf.inference import SamplingConfig, generate
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import Llama, LlamaConfig, Mixtral, MixtralConfig
from llmos_tf.models.layouts import mixtral_layouts
from llmos_tf.sharding import Layout

pytestmark = pytest.mark.fast

# 4 divides the heads and the experts, and not the hidden size.
LLAMA = LlamaConfig(
    vocab_size=30,
    max_positions=8,
    hidden_size=18,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    num_layers=2,
    feed_forward_size=24,
)
FIELDS = {k: v for k, v in LLAMA.to_dict().items() if k != "architecture"}
CONFIG = MixtralConfig(**FIELDS, num_experts=4, num_experts_per_token=2, capacity_factor=1.25)
TOKENS = np.random.default_rng(0).integers(0, 30, (4, 8)).astype("int32")


def make(config=CONFIG):
    keras.utils.set_random_seed(0)
    return Mixtral(config)


@pytest.mark.parametrize(
    "config",
    [CONFIG, dataclasses.replace(CONFIG, tie_embeddings=True, head_dim=6), None],
    ids=["plain", "tied", "moe_tiny"],
)
def test_counts_of_weights(config):
    """Fails if the formula or the model forgets a router or an expert, or the FLOPs count experts
    that a token is not sent to."""
    model = Mixtral.from_preset("moe_tiny") if config is None else make(config)
    config = model.config
    sizes = {w.path: w.shape.num_elements() for w in model.trainable_variables}
    assert model.num_parameters() == sum(sizes.values())
    active = config.num_experts_per_token / config.num_experts
    products = sum(s for path, s in sizes.items() if path.endswith("kernel"))
    products += active * sum(s for path, s in sizes.items() if "/experts/" in path)
    products += config.vocab_size * config.hidden_size
    assert config.num_matmul_parameters() == products


def test_with_equal_experts_it_is_a_llama(float64):
    """Fails if a norm or residual is missing around the mixture, or the routing's weights do not
    sum to 1: then it matters that there are several experts."""
    keras.utils.set_random_seed(0)
    llama, model = Llama(LLAMA), make()
    for mine, theirs in zip(model.blocks, llama.blocks, strict=True):
        mine.attention.set_weights(theirs.attention.get_weights())
        up, down = theirs.feed_forward.get_weights()
        experts = [np.stack([10 * up] * 4), np.stack([10 * down] * 4)]
        theirs.feed_forward.set_weights([10 * up, 10 * down])
        mine.feed_forward.experts.set_weights(experts)
    model.token_embedding.set_weights(llama.token_embedding.get_weights())
    model.output_embedding.set_weights(llama.output_embedding.get_weights())
    np.testing.assert_allclose(model(TOKENS), llama(TOKENS), rtol=0, atol=1e-12)


def test_initial_weights():
    """Fails if two kernels are drawn from one stream of random numbers, or experts are alike."""
    mixture = make().blocks[0].feed_forward
    router, up, down = (np.ravel(w.numpy()) for w in mixture.trainable_weights)
    assert np.std(up) == pytest.approx(0.02, rel=0.05)
    for one, other in ((router, up), (up, down), (up[: len(up) // 2], up[len(up) // 2 :])):
        length = min(len(one), len(other))
        assert np.abs(one[:length] - other[:length]).max() > 0.01


def test_logs_show_the_routing():
    """Fails if a user of `fit` does not see a collapse, or sees the load of another block."""
    model = make()
    model.compile("sgd", TokenCrossEntropy())
    history = model.fit(TOKENS, TOKENS, batch_size=4, verbose=0).history
    loads = np.stack([block.feed_forward.load.numpy() for block in model.blocks])
    dropped = [float(block.feed_forward.dropped) for block in model.blocks]
    assert history["moe_load_max"] == [pytest.approx(loads.max())]
    assert history["moe_load_min"] == [pytest.approx(loads.min())]
    assert history["moe_dropped"] == [pytest.approx(np.mean(dropped))]
    np.testing.assert_allclose(loads.sum(1), 1, rtol=1e-6)


def test_the_cache_changes_nothing(float64):
    """Fails if decoding, one token at a time, finds another expert or drops a token."""
    model = make()
    for variable in model.trainable_variables:
        # With new weights it repeats the last token.
        variable.assign(variable.numpy() * (20 if len(variable.shape) > 1 else 1))
    tokens = generate(model, TOKENS[:, :3], 5, SamplingConfig(temperature=0))
    for length in range(3, 8):
        best = np.argmax(model(tokens[:, :length]).numpy()[:, -1], -1)
        np.testing.assert_array_equal(tokens[:, length], best)
    assert len(np.unique(tokens[:, 3:])) > 3


@pytest.mark.parametrize(("expert", "tensor"), [(2, 2), (4, 1), (1, 4)])
def test_every_layout_names_a_variable_and_fits_it(expert, tensor):
    """Fails if a variable is renamed and its layout is not, or a layout has another order of
    dimensions than the variable."""
    paths = {w.path: tuple(w.shape) for w in make().trainable_weights}
    cut = set()
    for pattern, axes in mixtral_layouts(CONFIG, tensor).items():
        hits = [path for path in paths if re.fullmatch(pattern, path)]
        assert hits, pattern
        layout = axes if isinstance(axes, Layout) else Layout(axes)
        for path in hits:
            layout.check(path, paths[path], Mesh(expert=expert, tensor=tensor))
        cut.update(hits)
    whole = ("norm", "router", *(("key_value",) if tensor == 4 else ()))
    assert all(any(word in path for word in whole) for path in set(paths) - cut)


def test_a_saved_model_is_loaded_with_its_weights(tmp_path):
    """Fails if the file lacks the configuration, an expert or the load."""
    model = make()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (type(loaded), loaded.config) == (Mixtral, CONFIG)
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


def test_another_architecture_is_refused():
    """Fails if a Llama is made from a mixture's sizes, or the other way round."""
    with pytest.raises(ValueError, match=r"Llama takes a LlamaConfig\. Received: Mixtral"):
        Llama(CONFIG)
    with pytest.raises(ValueError, match=r"Mixtral takes a MixtralConfig\. Received: Llama"):
        Mixtral(LLAMA)
