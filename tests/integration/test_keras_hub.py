"""Models of KerasHub, unmodified, train and generate on a mesh as on one device.

The backbones have random small sizes. GPT-2 is compared to 1e-9 in float64. The others compute
some layers in float32 under every policy (`FLOAT32_LAYERS`, which a test reads off the graph), and
LoRA's adapters are float32 in Keras itself: there a difference of 1e-16 may round to the next
float32, so these are compared to 1e-6. 33 rows in batches of 8 are five steps, and the last one has
one row, fewer than a mesh has ways to split the batch.
"""

import contextlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import in_turn, usual
from references import shared

from llmos_tf import Mesh
from llmos_tf.strategies import MeshStrategy

if sys.version_info < (3, 11):
    pytest.skip("KerasHub 0.32 needs Python 3.11.", allow_module_level=True)

import keras_hub

ROWS, BATCH, LENGTH, PROMPT = 33, 8, 8, 3
FAMILIES = {
    "gpt2": (keras_hub.models.GPT2Backbone, keras_hub.models.GPT2CausalLM),
    "llama": (keras_hub.models.LlamaBackbone, keras_hub.models.LlamaCausalLM),
    "mistral": (keras_hub.models.MistralBackbone, keras_hub.models.MistralCausalLM),
    "gemma": (keras_hub.models.GemmaBackbone, keras_hub.models.GemmaCausalLM),
}
MESHES = {
    "fsdp2": Mesh(fsdp=2),
    "tensor2": Mesh(tensor=2),
    "data2,tensor2": Mesh(data=2, tensor=2),
}

# The layers of one block and of the end that cast float64 down to float32.
_LLAMA = {
    "self_attention",  # attention scores, for the softmax
    "transformer_layer_0",  # the activation of the feed-forward
    "self_attention_layernorm",
    "feedforward_layernorm",
    "sequence_output_layernorm",
}
FLOAT32_LAYERS = {
    "gpt2": set(),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma": {"attention", "pre_attention_norm", "pre_ffw_norm", "final_normalization"},
}


def random_sizes(family, seed, even=True):
    """Arguments of a small backbone; with `even`, a tensor axis of 2 divides what it cuts."""
    rng = np.random.default_rng([seed, *family.encode()])
    heads = int(rng.choice([2, 4]))
    head_dim = int(rng.choice([2, 4]))
    sizes = {
        "vocabulary_size": 2 * int(rng.integers(8, 16)) + (not even),
        "num_layers": int(rng.integers(1, 3)),
        "hidden_dim": heads * head_dim,
        "intermediate_dim": 4 * int(rng.integers(2, 5)) + 2 * (not even),
    }
    if family == "gpt2":
        return {**sizes, "num_heads": heads, "max_sequence_length": LENGTH + 2, "dropout": 0.0}
    sizes["num_query_heads"] = heads
    sizes["num_key_value_heads"] = int(rng.choice([2, heads])) if even else 1
    if family == "gemma":
        return {**sizes, "head_dim": head_dim}
    if family == "mistral":
        return {**sizes, "sliding_window": 5}
    return {**sizes, "tie_word_embeddings": bool(rng.integers(2))}


def make(family, strategy=None, rank=0, **sizes):
    """A compiled model as a user writes it, under a strategy's scope or on one device."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    backbone_class, task_class = FAMILIES[family]
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        backbone = backbone_class(**sizes)
        if rank:
            backbone.enable_lora(rank)
        model = task_class(backbone=backbone, preprocessor=None)
        model.compile(
            optimizer=keras.optimizers.AdamW(0.01),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            weighted_metrics=["accuracy"],
            sampler=keras_hub.samplers.TopKSampler(4, seed=0),
        )
    return model


def run(family, seed=0, even=True, rank=0, strategy=None):
    """Fits a model and lets it write; what it then says."""
    sizes = random_sizes(family, seed, even)
    model = make(family, strategy, rank, **sizes)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, sizes["vocabulary_size"], (ROWS, LENGTH + 1))
    # Sequences of unequal length, marked as KerasHub's preprocessors do.
    mask = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (ROWS, 1))
    inputs = {"token_ids": tokens[:, :-1] * mask, "padding_mask": mask}
    options = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
    fit = model.fit(inputs, tokens[:, 1:], sample_weight=mask, **options)
    # KerasHub counts positions in int32, and Keras's `arange` is int64 where floatx is float64:
    # Mistral fails with it, on one device too. The model keeps its dtype.
    keras.config.set_floatx("float32")
    is_prompt = np.tile(np.arange(LENGTH) < PROMPT, (4, 1))
    prompts = {"token_ids": tokens[:4, :-1] * is_prompt, "padding_mask": is_prompt}
    written = model.generate(prompts, stop_token_ids=None)
    keras.config.set_floatx("float64")
    results = {"history": fit.history, "weights": model.get_weights()}
    return model, results, np.asarray(written["token_ids"])


@shared
def one_device(family, seed, even, rank):
    return run(family, seed, even, rank)[1:]


def check(family, strategy, seed=0, even=True, rank=0):
    """Compares a run on a mesh with the one on one device; returns the model."""
    results, tokens = one_device(family, seed, even, rank)
    model, on_mesh, written = run(family, seed, even, rank, strategy)
    tolerance = 1e-6 if rank or FLOAT32_LAYERS[family] else 1e-9
    pairs = zip(keras.tree.flatten(on_mesh), keras.tree.flatten(results), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=tolerance, rtol=0)
    assert (written == tokens).all()
    assert (written[:, PROMPT:] > 0).any()
    return model


def own_map(family):
    """KerasHub's layout map of a family, made as its documentation says."""
    mesh = keras.distribution.DeviceMesh(
        shape=(1, 8), axis_names=("batch", "model"), devices=keras.distribution.list_devices()
    )
    return FAMILIES[family][0].get_layout_map(mesh, model_parallel_dim_name="model")


def cut_over_tensor(model):
    return {v.path for v in model.weights if "tensor" in v.value.layout.dims}


families = pytest.mark.parametrize("family", FAMILIES)
meshes = pytest.mark.parametrize("mesh", MESHES)


@pytest.mark.parametrize(("family", "mesh"), in_turn(FAMILIES, MESHES, 3))
def test_fit_and_generate(float64, family, mesh):
    """Fails if the layouts of a family are not found, if its attention computes with another rank's
    heads, if a boolean mask is not split with the rows, or if each rank draws its own tokens."""
    model = check(family, MeshStrategy(MESHES[mesh]))
    cut = cut_over_tensor(model)
    if mesh == "fsdp2":
        assert not cut
        assert all(v.value.layout.flat == ("fsdp",) for v in model.trainable_variables)
        return
    kernels = {v.path for v in model.weights if re.search("kernel|token_embedding", v.path)}
    assert kernels <= cut


@pytest.mark.parametrize(
    ("family", "mesh", "rank"),
    [
        ("llama", Mesh(pipe=2), 2),
        ("mistral", Mesh(pipe=2), 0),
        ("gemma", Mesh(pipe=2, tensor=2), 0),
    ],
    ids=str,
)
def test_pipeline(float64, family, mesh, rank):
    """Fails if what a backbone computes between its layers is lost at a cut, such as rotary
    positions or a causal mask, or if layers of a frozen backbone and adapters are told apart."""
    model = check(family, MeshStrategy(mesh), rank=rank)
    assert {(0,), (1,)} <= {variable.value.layout.stages for variable in model.weights}


@pytest.mark.parametrize("family", usual(["llama", "gemma"], "llama"))
def test_a_familys_own_layout_map(float64, family):
    """Fails if the layout map of KerasHub, written as its documentation says, is refused, or if its
    axes "batch" and "model" are not understood."""
    model = check(family, MeshStrategy(MESHES["data2,tensor2"], layout_map=own_map(family)))
    kernels = {v.path for v in model.weights if v.path.endswith("/kernel")}
    # The map has no rule for Llama's second table.
    assert cut_over_tensor(model) == kernels | {"token_embedding/embeddings"}


@pytest.mark.parametrize("family", usual(FAMILIES, "gemma"))
def test_lora(float64, family):
    """Fails if a layer with adapters multiplies with a slice of its kernel, if the frozen weights
    move, or if the adapters' gradients are not summed over the mesh."""
    model = check(family, MeshStrategy(MESHES["data2,tensor2"]), rank=2)
    trained = {v.path for v in model.trainable_variables}
    assert {path for path in trained if "lora" in path}
    assert not any(path.endswith("/kernel") for path in trained)


@pytest.mark.nightly
@families
@meshes
@pytest.mark.parametrize("rank", [0, 2], ids=["all", "lora"])
@pytest.mark.parametrize(("seed", "even"), [(1, True), (2, False)], ids=["even", "odd"])
def test_more_sizes(float64, family, mesh, rank, seed, even):
    """Fails as the tests above do; and for a vocabulary, or one head of keys and values, that the
    axis does not divide, if a layer takes the padded slice for a whole one."""
    check(family, MeshStrategy(MESHES[mesh]), seed, even, rank)


@pytest.mark.nightly
@families
@pytest.mark.parametrize("mesh", ["fsdp2", "tensor2"])
def test_lora_on_other_meshes(float64, family, mesh):
    """Fails as `test_lora` does."""
    check(family, MeshStrategy(MESHES[mesh]), rank=2)


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("mesh", ["tensor2", "data2,tensor2"])
@pytest.mark.parametrize("rank", [0, 2], ids=["all", "lora"])
def test_own_layout_maps_with_other_sizes(float64, family, mesh, rank):
    """Fails as `test_a_familys_own_layout_map` does."""
    check(family, MeshStrategy(MESHES[mesh], layout_map=own_map(family)), seed=1, rank=rank)


@families
def test_what_is_float32(float64, family):
    """Fails if another layer casts down, so that the tolerances above have no reason, or if one
    does so no more, so that they are too wide."""
    model = make(family, **{**random_sizes(family, 0), "num_layers": 1})
    spec = tf.TensorSpec((2, LENGTH), tf.int32)
    call = tf.function(lambda x, mask: model({"token_ids": x, "padding_mask": mask}))
    casts = [
        op.name.split("/")[-2]
        for op in call.get_concrete_function(spec, spec).graph.get_operations()
        if op.type == "Cast"
        and (op.inputs[0].dtype, op.outputs[0].dtype) == (tf.float64, tf.float32)
    ]
    # Keras numbers the second use of a name.
    assert {re.sub(r"_1$", "", name) for name in casts} == FLOAT32_LAYERS[family]
