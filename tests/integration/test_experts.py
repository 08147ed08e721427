"""Mixtral over an expert axis, alone and with every other axis, has the weights of one device.

Tolerance as in test_parity.py. The routing itself is a choice between numbers that differ by 1e-16
at most from one mesh to another: a token that is sent elsewhere shows at once.
"""

import contextlib
import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import usual
from references import shared

from llmos_tf import Mesh, memory
from llmos_tf.checkpoint import restore_checkpoint, save_checkpoint
from llmos_tf.inference import SamplingConfig, generate
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import Mixtral, MixtralConfig
from llmos_tf.scripts import train as train_script
from llmos_tf.strategies import MeshStrategy
from llmos_tf.testing import max_difference, train
from llmos_tf.training import make_train_step

TOLERANCE = 1e-9
ROWS, LENGTH, VOCABULARY, STEPS, EXPERTS = 8, 8, 30, 5, 4
# Losses of the routing so strong that a wrong one moves the weights.
CONFIG = {
    "vocab_size": VOCABULARY,
    "max_positions": LENGTH,
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 1,
    "feed_forward_size": 24,
    "num_experts": EXPERTS,
    "num_experts_per_token": 2,
    "load_balance_weight": 0.1,
    "router_z_weight": 0.1,
}
SEQUENCE_PARALLEL = {"sequence_parallel": True}
MESHES = {
    "expert2": (Mesh(expert=2), {}),
    "expert4": (Mesh(expert=4), {}),
    "data2-expert2-tensor2": (Mesh(data=2, expert=2, tensor=2), {}),
    "fsdp2-expert2": (Mesh(fsdp=2, expert=2), {}),
    "expert2-tensor2-sp": (Mesh(expert=2, tensor=2), SEQUENCE_PARALLEL),
    "expert2-context2": (Mesh(expert=2, context=2), {}),
    "expert2-context2-ulysses": (Mesh(expert=2, context=2), {"context_method": "ulysses"}),
    # Without an expert axis the experts are whole, or cut by columns.
    "data2-zero2": (Mesh(data=2), {"zero_stage": 2}),
    "tensor2": (Mesh(tensor=2), {}),
}
# The loss of load balance is that of a microbatch there, so it has no weight.
PIPE_MODEL = {"num_layers": 2, "load_balance_weight": 0.0}
PIPES = [
    pytest.param(Mesh(pipe=2, expert=2), {"schedule": "gpipe"}, id="pipe2-expert2-gpipe"),
    pytest.param(
        Mesh(pipe=2, data=2, expert=2),
        {"schedule": "zb-h1"},
        id="pipe2-data2-expert2",
        marks=pytest.mark.nightly,
    ),
    pytest.param(
        Mesh(pipe=2, expert=2, tensor=2),
        SEQUENCE_PARALLEL,
        id="pipe2-expert2-tensor2-sp",
        marks=pytest.mark.nightly,
    ),
]
CASES = usual(
    MESHES,
    "data2-expert2-tensor2",
    "fsdp2-expert2",
    "expert2-tensor2-sp",
    "expert2-context2-ulysses",
    "tensor2",
)
LIMITED = usual(
    ["data2-expert2-tensor2", "expert2-context2", "expert2-tensor2-sp"],
    "expert2-context2",
    "expert2-tensor2-sp",
)


@functools.cache
def batches(rows=ROWS):
    """Token batches in which rows carry unequal weight, so that a mean of means shows."""
    rng = np.random.default_rng(0)
    shape = (STEPS, rows, LENGTH)
    x = rng.integers(0, VOCABULARY, shape).astype("int32")
    y = rng.integers(0, VOCABULARY, shape).astype("int32")
    weights = rng.random(shape) * (rng.random(shape) > 0.3)
    weights[:, : rows // 2] *= 0.2
    return list(zip(x, y, weights, strict=True))


def build(**changes):
    model = Mixtral(MixtralConfig(**{**CONFIG, **changes}))
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), TokenCrossEntropy())
    return model


@shared
def one_device(**changes):
    return train(lambda: build(**changes), batches())._replace(model=None)


def check_parity(strategy, **changes):
    reference = one_device(**changes)
    result = train(lambda: build(**changes), batches(), strategy)
    # One program for each stage.
    assert strategy.num_traces == strategy.mesh.axis_size("pipe")
    # The load of the experts is among the weights.
    assert max_difference(reference, result) <= TOLERANCE
    np.testing.assert_allclose(result.losses, reference.losses, atol=TOLERANCE, rtol=0)
    return result.model


@pytest.mark.parametrize("mesh", CASES)
def test_mesh_has_the_weights_of_one_device(float64, mesh):
    """Fails for a token that meets another expert or none, a gradient that stays on the rank that
    computed it or is counted twice, or routing losses of a rank's own tokens in place of all."""
    check_parity(MeshStrategy(MESHES[mesh][0], **MESHES[mesh][1]))


@pytest.mark.parametrize(("mesh", "options"), PIPES)
def test_pipeline_has_the_weights_of_one_device(float64, mesh, options):
    """Fails if rows of one stage's mixture meet another's, or if the load of a batch is that of its
    last microbatch."""
    check_parity(MeshStrategy(mesh, num_microbatches=2, **options), **PIPE_MODEL)


@pytest.mark.parametrize("mesh", LIMITED)
def test_the_same_tokens_have_no_room_on_a_mesh(float64, mesh):
    """Fails if an expert's room is counted over what a rank holds of a sequence."""
    strategy = MeshStrategy(MESHES[mesh][0], **MESHES[mesh][1])
    model = check_parity(strategy, capacity_factor=0.75)
    assert float(model.routing_summary()["moe_dropped"]) > 0.1


@pytest.mark.parametrize(("num_rows", "data"), usual([(17, 2), (19, 4)], (17, 2)))
def test_uneven_batches(float64, num_rows, data):
    """Fails if a rank without rows counts in the routing's losses or in the load, or a buffer is
    sized for another batch: the last one has 1 row for 2 ranks of data, or 3 rows for 4."""
    rows = [np.concatenate(column)[:num_rows] for column in zip(*batches(), strict=True)]

    def fit(strategy):
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        with strategy.scope() if strategy else contextlib.nullcontext():
            model = build()
        model.fit(
            rows[0],
            rows[1],
            sample_weight=rows[2],
            batch_size=8,
            shuffle=False,
            verbose=0,
            epochs=2,
        )
        return model.get_weights()

    expected = fit(None)
    for one, other in zip(expected, fit(MeshStrategy(Mesh(data=data, expert=2))), strict=True):
        np.testing.assert_allclose(other, one, atol=TOLERANCE, rtol=0)


def ops_of(function, arguments):
    """Every op of a traced step, the functions in it included."""
    graph = function.get_concrete_function(*arguments).graph
    definition = graph.as_graph_def()
    inside = [node for f in definition.library.function for node in f.node_def]
    return [node.op for node in (*definition.node, *inside)]


def test_rows_travel_by_all_to_all_and_a_rank_stores_its_experts(float64):
    """Fails if the experts are gathered instead, all of them computed everywhere, or stored whole.
    Each block sends rows there and back, forward and backward; no other layer does."""
    num_layers = 2
    strategy = MeshStrategy(Mesh(expert=2))
    with strategy.scope():
        model = build(num_layers=num_layers)
    step = make_train_step(model, model.optimizer, TokenCrossEntropy())
    x, y, weights = batches()[0]
    ops = ops_of(step, (tf.constant(x), tf.constant(y), tf.constant(weights)))
    assert ops.count("CollectiveAllToAllV2") == 4 * num_layers
    whole = {w.path: w.shape.num_elements() for w in model.trainable_variables}
    experts = sum(size for path, size in whole.items() if "/experts/" in path)
    expected = 8 * (sum(whole.values()) - experts + experts // 2)
    assert [row["parameters"] for row in memory.report(model)] == [expected] * 2


def test_a_mixture_goes_on_and_generates_on_another_mesh(float64, tmp_path):
    """Fails if a checkpoint loses an expert or the load, or decoding, where the ranks of the expert
    axis hold the same tokens, gives another token than one device."""
    with MeshStrategy(Mesh(expert=2)).scope():
        model = build()
    model.fit(*batches()[0][:2], batch_size=ROWS, verbose=0)
    save_checkpoint(tmp_path, model, step=1)
    prompt = batches()[0][0][:3, :4]
    greedy = SamplingConfig(temperature=0)
    expected = generate(model, prompt, 4, greedy)
    keras.backend.clear_session()
    for mesh in (Mesh(), Mesh(expert=4), Mesh(fsdp=2, expert=2, tensor=2)):
        with MeshStrategy(mesh).scope():
            other = build()
        restore_checkpoint(tmp_path / "step-00000001", other)
        for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(generate(other, prompt, 4, greedy), expected)


def test_experts_that_the_axis_does_not_divide_are_refused():
    """Fails if the user learns it from a shape error while the step is traced."""
    strategy = MeshStrategy(Mesh(expert=3))
    with pytest.raises(ValueError, match="axis expert of size 3 does not"), strategy.scope():
        build()


@pytest.mark.nightly
def test_the_laptop_preset_trains_and_generates(tmp_path, run_program):
    """Fails if llmos-train cannot make a mixture, or its metrics do not show the routing."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{(k * k) % 23}" for k in range(2000)))
    done = run_program(
        train_script,
        "--virtual_devices=8",
        "--preset=moe_tiny",
        "--mesh=expert=2",
        "--global_batch=4",
        "--seq_len=16",
        "--steps=3",
        f"--data={text}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.status == 0, done.err
    assert "Continuation:" in done.out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert 0 <= row["moe_load_min"] <= 1 / 8 <= row["moe_load_max"] <= 1 / 2
