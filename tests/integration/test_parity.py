"""Every mesh trains GPT and Llama to the weights of one device, in float64.

Sums in another order differ by 1e-16 relative; Adam's division by the root of a tiny second moment
magnifies that to some 1e-14. 1e-9 is far above both and far below any wrong factor, mask or axis.
"""

import functools

import keras
import numpy as np
import pytest
from lanes import in_turn
from references import shared

from llmos_tf import Mesh
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig, Llama, LlamaConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.testing import max_difference, train

pytestmark = pytest.mark.graph_optimizer

TOLERANCE = 1e-9
ROWS, LENGTH, VOCABULARY, STEPS = 8, 8, 30, 5

MODELS = {
    "gpt": lambda: GPT(
        GPTConfig(
            vocab_size=VOCABULARY, max_positions=LENGTH, hidden_size=16, num_heads=4, num_layers=2
        )
    ),
    # Two key-value heads: the tensor axis of 2 divides them, that of 4 does not.
    "llama": lambda: Llama(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_positions=LENGTH,
            hidden_size=16,
            num_heads=4,
            num_kv_heads=2,
            num_layers=2,
            feed_forward_size=24,
        )
    ),
}
OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
}
MESHES = {
    "data2": (Mesh(data=2), {}),
    "data2-zero1": (Mesh(data=2), {"zero_stage": 1}),
    "data2-zero2": (Mesh(data=2), {"zero_stage": 2}),
    "fsdp2-zero3": (Mesh(fsdp=2), {"zero_stage": 3}),
    "tensor2": (Mesh(tensor=2), {}),
    "tensor2-sp": (Mesh(tensor=2), {"sequence_parallel": True}),
    # 4 does not divide 30 tokens nor 2 key-value heads.
    "tensor4": (Mesh(tensor=4), {}),
    "tensor4-sp": (Mesh(tensor=4), {"sequence_parallel": True}),
    "data2-tensor2": (Mesh(data=2, tensor=2), {}),
    "fsdp2-tensor2": (Mesh(fsdp=2, tensor=2), {}),
    "fsdp2-tensor2-sp": (Mesh(fsdp=2, tensor=2), {"sequence_parallel": True}),
    "data2-fsdp2-tensor2": (Mesh(data=2, fsdp=2, tensor=2), {"zero_stage": 1}),
    "data2-fsdp2-tensor2-sp": (Mesh(data=2, fsdp=2, tensor=2), {"sequence_parallel": True}),
}


# Each mesh trains one model with one optimizer with every change, in turn; the rest is nightly.
RUNS = {f"{model}-{optimizer}": (model, optimizer) for model in MODELS for optimizer in OPTIMIZERS}
CASES = in_turn(RUNS, MESHES, 4)


@functools.cache
def batches():
    """Token batches in which rows carry unequal weight, so that a mean of means shows."""
    rng = np.random.default_rng(0)
    shape = (STEPS, ROWS, LENGTH)
    x = rng.integers(0, VOCABULARY, shape).astype("int32")
    y = rng.integers(0, VOCABULARY, shape).astype("int32")
    weights = rng.random(shape) * (rng.random(shape) > 0.3)
    weights[:, : ROWS // 2] *= 0.2
    return list(zip(x, y, weights, strict=True))


def build(model, optimizer):
    made = MODELS[model]()
    made.compile(OPTIMIZERS[optimizer](), TokenCrossEntropy())
    return made


@shared
def one_device(model, optimizer):
    return train(lambda: build(model, optimizer), batches())._replace(model=None)


@pytest.mark.parametrize(("run", "mesh"), CASES)
def test_mesh_has_the_weights_of_one_device(float64, run, mesh):
    """Fails for a missing or double reduce, a mean of means, a wrong slice, an unsummed partial
    gradient (sequence parallelism, whole key-value heads), a padded vocabulary that takes part."""
    reference = one_device(*RUNS[run])
    strategy = MeshStrategy(MESHES[mesh][0], **MESHES[mesh][1])
    result = train(lambda: build(*RUNS[run]), batches(), strategy)
    assert strategy.num_traces == 1
    assert max_difference(reference, result) <= TOLERANCE
    np.testing.assert_allclose(result.losses, reference.losses, atol=TOLERANCE, rtol=0)


def test_uneven_batches_on_a_tensor_mesh(float64):
    """Fails if a collective remembers the shape of an earlier batch, or rows are not weighted."""
    rows = [np.concatenate(column)[:19] for column in zip(*batches(), strict=True)]

    def fit(strategy):
        keras.backend.clear_session()
        keras.utils.set_random_seed(0)
        if strategy is None:
            model = build("gpt", "momentum")
        else:
            with strategy.scope():
                model = build("gpt", "momentum")
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
    actual = fit(MeshStrategy(Mesh(data=2, tensor=2), sequence_parallel=True))
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_allclose(other, one, atol=TOLERANCE, rtol=0)
