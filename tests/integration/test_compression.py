"""What compression of gradients does to the loss of `gpt_tiny`, against the curve without it.

docs/compression.md and its picture are written by

    WRITE_COMPRESSION=1 python3 -m pytest -m '' tests/integration/test_compression.py
"""

import functools
import itertools
import os
from pathlib import Path

import keras
import matplotlib.figure
import numpy as np
import pytest

from llmos_tf import Mesh, collectives, devices
from llmos_tf.data import BatchIterator, load_text_data
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import GPT
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training import make_train_step

DOCS = Path(__file__).parents[2] / "docs"
STEPS, BATCH, LENGTH, WINDOW = 80, 8, 64, 10
# By how much the mean of the last ten losses may be above that without compression, in nats.
BOUNDS = {"bf16": 0.01, "fp16": 0.01, "int8": 0.02, "powersgd": 0.05}


@functools.cache
def curve(method):
    """Losses of each step, and bytes that a rank sends along `data` in a step."""
    mesh = Mesh(data=2, devices=devices.visible_devices()[:2])
    strategy = MeshStrategy(mesh, gradient_compression=method)
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = GPT.from_preset("gpt_tiny")
        optimizer = keras.optimizers.AdamW(1e-3)
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    text = load_text_data("stdlib", None, LENGTH)
    batches = itertools.islice(BatchIterator(text.train, BATCH, seed=0), STEPS)
    losses = np.array([float(step(*batch)) for batch in batches])
    rows = collectives.traffic(strategy, step)
    return losses, sum(r["bytes"] for r in rows if r["kind"] == "all_reduce")


def smoothed(losses):
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid")


@pytest.mark.nightly
@pytest.mark.parametrize("method", BOUNDS)
def test_trains_like_the_uncompressed(method):
    """Fails if what is sent leaves out what matters: without error feedback, or with a side of
    PowerSGD that is not of the step before, the curve stays above."""
    (plain, all_bytes), (losses, sent) = curve(None), curve(method)
    assert plain[-WINDOW:].mean() < 0.8 * plain[0]
    assert smoothed(losses)[-1] - smoothed(plain)[-1] <= BOUNDS[method]
    assert sent < 0.51 * all_bytes


@pytest.mark.nightly
@pytest.mark.skipif("WRITE_COMPRESSION" not in os.environ, reason="writes docs/compression.md")
def test_write_document():
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps")
    rows = []
    for method in (None, *BOUNDS):
        losses, sent = curve(method)
        axes.plot(np.arange(WINDOW, STEPS + 1), smoothed(losses), label=method or "none", lw=1)
        gap = smoothed(losses)[-1] - smoothed(curve(None)[0])[-1]
        bound = BOUNDS.get(method, 0)
        rows.append(
            f"| {method or 'none'} | {sent:,} | {smoothed(losses)[-1]:.4f} | {gap:+.4f} | {bound} |"
        )
    axes.legend()
    figure.savefig(DOCS / "compression.png", dpi=100)
    table = "\n".join(rows)
    (DOCS / "compression.md").write_text(
        f"""# Compression of gradients

`gpt_tiny` on two devices (`data=2`), {STEPS} steps of AdamW at a rate of 1e-3, {BATCH} rows of \
{LENGTH} bytes of Python's standard library, the same seeds and batches. Written by

```
WRITE_COMPRESSION=1 python3 -m pytest -m '' tests/integration/test_compression.py
```

| `gradient_compression` | bytes a rank sends in a step | mean of the last {WINDOW} losses \
| against none | bound of the test |
|---|---:|---:|---:|---:|
{table}

![loss curves](compression.png)

PowerSGD has rank 4, and starts from random matrices. [ADR 10]\
(adr/0010-sums-of-gradients-are-two-exchanges.md) says how each works.
"""
    )
