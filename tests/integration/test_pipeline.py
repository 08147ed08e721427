"""Every pipeline trains to the weights of one device, in float64.

The tolerance is that of `test_parity`: sums in another order differ by some 1e-14, and 1e-9 is far
above that and far below any wrong factor, order or microbatch.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from references import shared

from llmos_tf import Mesh
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy, PipelineParallelStrategy
from llmos_tf.testing import max_difference, train
from llmos_tf.training import make_train_step

TOLERANCE = 1e-9
ROWS, LENGTH, VOCABULARY, STEPS = 16, 8, 30, 5

SCHEDULES = {"gpipe": {}, "1f1b": {}, "interleaved": {"num_chunks": 2}, "zb-h1": {}, "zb-v": {}}
# (schedule, stages, microbatches) that run with every change; the others are nightly.
USUAL = {
    ("1f1b", 4, 4),
    ("interleaved", 2, 4),
    ("zb-h1", 4, 8),
    ("zb-v", 2, 8),
}
MATRIX = [
    pytest.param(
        name,
        stages,
        microbatches,
        marks=[] if (name, stages, microbatches) in USUAL else pytest.mark.nightly,
        id=f"{name}-{stages}x{microbatches}",
    )
    for name in SCHEDULES
    for stages in (2, 4)
    for microbatches in (4, 8)
]
PRODUCTS = {
    "pipe2-data2-tensor2-interleaved": (
        Mesh(pipe=2, data=2, tensor=2),
        {"schedule": "interleaved", "num_chunks": 2},
    ),
}
NIGHTLY_PRODUCTS = {
    "pipe2-fsdp2-zb-v": (Mesh(pipe=2, fsdp=2), {"schedule": "zb-v"}),
    "pipe2-data2-tensor2": (Mesh(pipe=2, data=2, tensor=2), {}),
    "pipe2-data2-zero1": (Mesh(pipe=2, data=2), {"zero_stage": 1}),
    "pipe2-fsdp2-context2": (Mesh(pipe=2, fsdp=2, context=2), {}),
    "pipe2-tensor2-sp": (Mesh(pipe=2, tensor=2), {"sequence_parallel": True}),
    "pipe2-fsdp2-tensor2": (Mesh(pipe=2, fsdp=2, tensor=2), {"schedule": "zb-h1"}),
    "pipe2-data2-fsdp2": (Mesh(pipe=2, data=2, fsdp=2), {}),
    "pipe2-context2-tensor2": (Mesh(pipe=2, context=2, tensor=2), {"schedule": "gpipe"}),
    "pipe2-context2-tensor2-ulysses": (
        Mesh(pipe=2, context=2, tensor=2),
        {"context_method": "ulysses"},
    ),
    "pipe2-data2-context2": (Mesh(pipe=2, data=2, context=2), {"schedule": "zb-v"}),
}


@functools.cache
def batches():
    """Token batches in which rows, and so microbatches, carry unequal weight."""
    rng = np.random.default_rng(0)
    shape = (STEPS, ROWS, LENGTH)
    x = rng.integers(0, VOCABULARY, shape).astype("int32")
    y = rng.integers(0, VOCABULARY, shape).astype("int32")
    weights = rng.random(shape) * (rng.random(shape) > 0.3)
    weights[:, : ROWS // 2] *= 0.2
    return list(zip(x, y, weights, strict=True))


def build(num_layers=4):
    config = GPTConfig(
        vocab_size=VOCABULARY,
        max_positions=LENGTH,
        hidden_size=16,
        num_heads=4,
        num_layers=num_layers,
    )
    model = GPT(config)
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5)
    model.compile(optimizer, TokenCrossEntropy())
    return model


@shared
def one_device(num_layers=4):
    """What training leaves, and what the model then predicts and says of the first batch."""
    result = train(functools.partial(build, num_layers), batches())
    return result._replace(model=None), outputs_of(result.model)


def outputs_of(model):
    x, y, weights = batches()[0]
    prediction = model.predict(x, verbose=0)
    return prediction, model.evaluate(x, y, sample_weight=weights, verbose=0)


def check(strategy, num_layers=4):
    reference, _ = one_device(num_layers)
    result = train(functools.partial(build, num_layers), batches(), strategy)
    assert max_difference(reference, result) <= TOLERANCE
    np.testing.assert_allclose(result.losses, reference.losses, atol=TOLERANCE, rtol=0)
    return result.model


@pytest.mark.parametrize(("name", "stages", "microbatches"), MATRIX)
def test_schedule_has_the_weights_of_one_device(float64, name, stages, microbatches):
    """Fails for a microbatch that is lost or counted twice, a tied embedding whose gradients are
    not summed over its stages, a norm without the other stages' weights, a mean of means."""
    options = {"schedule": name, "num_microbatches": microbatches, **SCHEDULES[name]}
    # Two parts on each of four stages need eight blocks.
    parts = stages * {"interleaved": 2, "zb-v": 2}.get(name, 1)
    check(MeshStrategy(Mesh(pipe=stages), **options), num_layers=max(parts, 4))


@pytest.mark.parametrize("mesh", PRODUCTS)
def test_product_has_the_weights_of_one_device(float64, mesh):
    """Fails for a collective of one stage that meets another's, or a sum over the wrong axes."""
    check(MeshStrategy(PRODUCTS[mesh][0], num_microbatches=4, **PRODUCTS[mesh][1]))


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", NIGHTLY_PRODUCTS)
def test_other_product_has_the_weights_of_one_device(float64, mesh):
    """As above, on more meshes."""
    mesh, options = NIGHTLY_PRODUCTS[mesh]
    check(MeshStrategy(mesh, num_microbatches=4, **options))


def test_a_stage_holds_its_own_weights_and_nothing_else(float64):
    """Fails if a weight or its optimizer state lies on a stage that does not use it, or if
    evaluate, predict and get_weights do not see all of them."""
    model = check(MeshStrategy(Mesh(pipe=2), num_microbatches=4))
    by_path = {v.path.partition("/")[2]: v.value for v in model.trainable_variables}
    assert by_path["token_embedding/table"].layout.stages == (0, 1)
    assert by_path["position_embedding/table"].layout.stages == (0,)
    assert by_path["final_norm/gamma"].layout.stages == (1,)
    for variable in by_path.values():
        for stage, part in enumerate(variable.values):
            holds = stage in variable.layout.stages
            assert part.shape == (variable.shape if holds else (0,))
    states = {v.path: v.value for v in model.optimizer.variables if "block_0" in v.path}
    assert states
    assert {state.layout.stages for state in states.values()} == {(0,)}

    _, expected = one_device()
    for one, other in zip(outputs_of(model), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_program_does_not_grow_with_microbatches(float64):
    """Fails if a stage's program has a call for each microbatch: the first step would grow."""

    def num_nodes(microbatches):
        strategy = PipelineParallelStrategy(["CPU:0", "CPU:1"], num_microbatches=microbatches)
        with strategy.scope():
            model = build()
            step = make_train_step(model, model.optimizer, TokenCrossEntropy())
        x, y, _ = batches()[0]
        rows = tf.constant(np.repeat(x, 2, 0)), tf.constant(np.repeat(y, 2, 0))
        graph = step.get_concrete_function(*rows).graph.as_graph_def()
        return len(graph.node) + sum(len(f.node_def) for f in graph.library.function)

    # A constant that is folded or not may make a difference of a few.
    assert abs(num_nodes(32) - num_nodes(4)) < 50


def test_one_device_is_no_pipeline():
    """Fails if the error for a machine with one device is that of a mesh."""
    with pytest.raises(ValueError, match="at least 2 stages"):
        PipelineParallelStrategy(["CPU:0"], num_microbatches=2)


def test_models_and_batches_that_do_not_fit():
    """Fails if the error comes after tracing, or does not say the numbers."""
    x, y, _ = batches()[0]
    strategy = MeshStrategy(Mesh(pipe=4), num_microbatches=4)
    with strategy.scope():
        model = build(num_layers=2)
    with pytest.raises(ValueError, match=r"(?s)4 parts.*2 blocks"):
        model.fit(x, y, batch_size=ROWS, verbose=0)
    strategy = MeshStrategy(Mesh(pipe=2), num_microbatches=3)
    with strategy.scope():
        model = build()
    with pytest.raises(ValueError, match="num_microbatches=3"):
        model.fit(x, y, batch_size=ROWS, verbose=0)
    assert strategy.num_traces == 0


def test_stage_of_overrules_the_cut():
    """Fails if a named layer is not on its stage, or a wrong name or order is taken in silence."""

    def stages(**stage_of):
        strategy = MeshStrategy(Mesh(pipe=2), num_microbatches=2, stage_of=stage_of)
        with strategy.scope():
            model = keras.Sequential(
                [keras.Input([4]), *(keras.layers.Dense(4, name=f"d{i}") for i in range(4))]
            )
            model.compile("sgd", "mse")
        model.fit(np.ones([4, 4]), np.ones([4, 4]), batch_size=4, verbose=0)
        return [layer.kernel.value.layout.stages[0] for layer in model.layers]

    assert stages(d0=0, d1=1) == [0, 1, 1, 1]
    assert stages(d2=0) == [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"(?s)'e1'.*d1"):
        stages(e1=1)
    with pytest.raises(ValueError, match="no way to cut"):
        stages(d0=1, d3=0)
