"""Two hundred steps of `gpt_tiny` on the standard library's text, on six meshes.

`tests/golden/gpt_tiny_losses.json` holds one device's loss before each step, in float32 and under
AdamW. Another version of Python has another standard library, so there one device is run first. To
write the file anew, after a change that is meant to move numbers:

    WRITE_GOLDEN_LOSSES=1 python3 -m pytest -m '' tests/integration/test_golden_losses.py
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest

from llmos_tf import Mesh, devices
from llmos_tf.data import BatchIterator, load_text_data
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training import make_train_step

pytestmark = pytest.mark.nightly

GOLDEN = Path(__file__).parents[1] / "golden" / "gpt_tiny_losses.json"
STEPS, BATCH, LENGTH = 200, 8, 64
TOLERANCE = 1e-3
MESHES = {
    "data2": {"data": 2},
    "data4-zero1": {"data": 4},
    "fsdp4": {"fsdp": 4},
    "tensor2": {"tensor": 2},
    "data2-tensor2-sequence": {"data": 2, "tensor": 2},
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
}
OPTIONS = {"data4-zero1": {"zero_stage": 1}, "data2-tensor2-sequence": {"sequence_parallel": True}}


def mesh_strategy(name):
    axes = MESHES[name]
    size = int(np.prod(list(axes.values())))
    mesh = Mesh(**axes, devices=devices.visible_devices()[:size])
    return MeshStrategy(mesh, **OPTIONS.get(name, {}))


@functools.cache
def batches():
    text = load_text_data("stdlib", None, LENGTH)
    return list(itertools.islice(BatchIterator(text.train, BATCH, seed=0), STEPS))


def losses_of(strategy=None):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy is not None else contextlib.nullcontext():
        model = GPT.from_preset("gpt_tiny")
        optimizer = keras.optimizers.AdamW(1e-3)
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    return np.array([float(step(*batch)) for batch in batches()])


@functools.cache
def one_device():
    """The stored curve where it is of the same text, else one that is made now."""
    text = hashlib.sha256(b"".join(part.tobytes() for batch in batches() for part in batch))
    if os.environ.get("WRITE_GOLDEN_LOSSES"):
        stored = {
            "steps": STEPS,
            "batch": BATCH,
            "sequence_length": LENGTH,
            "text_sha256": text.hexdigest(),
            "losses": [round(float(loss), 6) for loss in losses_of()],
        }
        GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
    stored = json.loads(GOLDEN.read_text())
    if stored["text_sha256"] == text.hexdigest():
        return np.array(stored["losses"])
    return losses_of()


@pytest.mark.parametrize("name", MESHES)
def test_losses_of_a_mesh_are_one_devices_at_every_step(name):
    """Fails if a mesh trains otherwise than one device, in a way that five steps are too short or
    float64 is too exact to show; or if a change moves the numbers of one device."""
    golden = one_device()
    losses = losses_of(mesh_strategy(name))
    assert golden[-20:].mean() < 0.75 * golden[:20].mean()
    worst = int(np.argmax(np.abs(losses - golden)))
    print(f"{name}: max |loss - golden| {abs(losses[worst] - golden[worst]):.1e} at step {worst}")
    np.testing.assert_allclose(losses, golden, rtol=0, atol=TOLERANCE)
