"""Products of three and four axes on sixteen devices have the weights of one, in float64.

The other tests share a process with eight devices; this file, run as a program, is one with
sixteen. The tolerance is that of `test_parity`.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from llmos_tf import Mesh, devices
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT, GPTConfig, Mixtral, MixtralConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.testing import max_difference, train

TOLERANCE = 1e-9
ROWS, LENGTH, VOCABULARY, STEPS = 8, 16, 30, 5
PIPELINE = {"num_microbatches": 2}
MESHES = {
    "pipe2-data2-context2-tensor2": (Mesh(pipe=2, data=2, context=2, tensor=2), PIPELINE),
    "pipe2-fsdp2-context2-tensor2-zb-v": (
        Mesh(pipe=2, fsdp=2, context=2, tensor=2),
        {**PIPELINE, "schedule": "zb-v", "context_method": "ulysses"},
    ),
    "pipe4-data2-tensor2": (Mesh(pipe=4, data=2, tensor=2), {"num_microbatches": 4}),
    "data2-fsdp2-expert2-tensor2": (Mesh(data=2, fsdp=2, expert=2, tensor=2), {}),
    "data2-expert2-context2-tensor2": (
        Mesh(data=2, expert=2, context=2, tensor=2),
        {"sequence_parallel": True},
    ),
    "pipe2-data2-expert2-tensor2": (Mesh(pipe=2, data=2, expert=2, tensor=2), PIPELINE),
}


def build(name):
    sizes = {
        "vocab_size": VOCABULARY,
        "max_positions": LENGTH,
        "hidden_size": 16,
        "num_heads": 4,
        "num_layers": 4,
    }
    if "expert" in name:
        # The loss of load balance is that of a microbatch in a pipeline.
        routing = {
            "num_experts": 4,
            "num_experts_per_token": 2,
            "load_balance_weight": 0.0 if "pipe" in name else 0.1,
        }
        model = Mixtral(MixtralConfig(**sizes, num_kv_heads=2, feed_forward_size=24, **routing))
    else:
        model = GPT(GPTConfig(**sizes))
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5)
    model.compile(optimizer, TokenCrossEntropy())
    return model


def difference(name):
    """Returns max |Δ| of weights and losses between a mesh and one device."""
    devices.configure_virtual_cpus(16)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, (STEPS, ROWS, LENGTH + 1)).astype("int32")
    weights = rng.random((STEPS, ROWS, LENGTH))
    batches = list(zip(tokens[..., :-1], tokens[..., 1:], weights, strict=True))
    mesh, options = MESHES[name]
    one = train(lambda: build(name), batches)
    other = train(lambda: build(name), batches, MeshStrategy(mesh, **options))
    return max(max_difference(one, other), np.abs(np.subtract(one.losses, other.losses)).max())


@pytest.mark.nightly
@pytest.mark.parametrize("name", MESHES)
def test_product_has_the_weights_of_one_device(name):
    """Fails for a sum over the wrong axes that a product of three does not have."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, name]
    found = subprocess.check_output(command, env=environment, text=True)
    assert float(found) <= TOLERANCE


if __name__ == "__main__":
    print(difference(sys.argv[1]))
