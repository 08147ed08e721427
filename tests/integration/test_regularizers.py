"""Regularizers count once, on weights of whose gradient each rank has a part, in float64.

The tolerance is that of `test_parity`.
"""

import functools

import keras
import numpy as np
import pytest
from lanes import usual
from references import shared

from llmos_tf import Mesh
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import Llama, LlamaConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.testing import max_difference, train

TOLERANCE = 1e-9
MESHES = {
    "data2": (Mesh(data=2), {}),
    "fsdp2": (Mesh(fsdp=2), {}),
    # Norms are used in positions that are split over `tensor`.
    "tensor2-sp": (Mesh(tensor=2), {"sequence_parallel": True}),
    # Both heads of keys are whole, those of queries are split.
    "tensor4": (Mesh(tensor=4), {}),
    "context2": (Mesh(context=2), {}),
    "expert2": (Mesh(expert=2), {}),
    "pipe2-context2-zb-h1": (
        Mesh(pipe=2, context=2),
        {"num_microbatches": 2, "schedule": "zb-h1"},
    ),
}


def build():
    config = LlamaConfig(
        vocab_size=30,
        max_positions=8,
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2,
        num_layers=2,
        feed_forward_size=24,
    )
    model = Llama(config)
    for variable in model.trainable_variables:
        variable.regularizer = keras.regularizers.L2(0.05)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), TokenCrossEntropy())
    return model


@functools.cache
def batches():
    tokens = np.random.default_rng(0).integers(0, 30, (3, 8, 9)).astype("int32")
    return [(batch[:, :-1], batch[:, 1:]) for batch in tokens]


@shared
def one_device():
    return train(build, batches())._replace(model=None)


@pytest.mark.parametrize(
    "mesh", usual(MESHES, "fsdp2", "tensor2-sp", "expert2", "pipe2-context2-zb-h1")
)
def test_regularizers(float64, mesh):
    """Fails if the gradient of a regularizer is summed over an axis over which that of the model
    is, or if its value is."""
    strategy = MeshStrategy(MESHES[mesh][0], **MESHES[mesh][1])
    result = train(build, batches(), strategy)
    np.testing.assert_allclose(result.losses, one_device().losses, atol=TOLERANCE, rtol=0)
    assert max_difference(one_device(), result) <= TOLERANCE
