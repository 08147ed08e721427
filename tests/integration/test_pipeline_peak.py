"""The activations of a pipeline are bounded at run time as the schedule says.

What a process keeps at its peak is measured from outside, in a process for each schedule: one that
has held much before would show nothing. Run as a program, this file is that process.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from llmos_tf import Mesh, devices
from llmos_tf.memory import peak_resident_bytes
from llmos_tf.strategies import MeshStrategy

STAGES, MICROBATCHES, ROWS, WIDTH = 2, 16, 32768, 64
LAYERS_IN_STAGE, FLOAT = 4, 4


def peak_bytes(schedule: str) -> int:
    """Returns how much more a process held in the first steps than before them, in bytes."""
    devices.configure_virtual_cpus(STAGES)
    strategy = MeshStrategy(Mesh(pipe=STAGES), num_microbatches=MICROBATCHES, schedule=schedule)
    with strategy.scope():
        hidden = [keras.layers.Dense(WIDTH, "tanh") for _ in range(STAGES * LAYERS_IN_STAGE - 1)]
        model = keras.Sequential([keras.Input([1]), *hidden, keras.layers.Dense(1)])
        model.compile("sgd", "mse")
    few = np.zeros([MICROBATCHES, 1], "float32")
    model.train_on_batch(few, few)
    before = peak_resident_bytes()
    rows = np.zeros([MICROBATCHES * ROWS, 1], "float32")
    model.train_on_batch(rows, rows)
    return peak_resident_bytes() - before


@pytest.mark.nightly
def test_1f1b_keeps_less_than_gpipe():
    """Fails if a stage takes its passes in another order than the schedule's, such as all forward
    passes as soon as their inputs are there, or if what a pass keeps is not freed after it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    peaks = {}
    for name in ("gpipe", "1f1b"):
        command = [sys.executable, __file__, name]
        peaks[name] = int(subprocess.check_output(command, env=environment, text=True))
    # Of each layer but the first the input, which is the output of the one before. 2104.04473: a
    # stage holds m of its microbatches at once, or p - s.
    part = LAYERS_IN_STAGE * ROWS * WIDTH * FLOAT
    live = {"gpipe": STAGES * MICROBATCHES, "1f1b": sum(range(1, STAGES + 1))}
    # What a pass needs for itself is the same for both. The tenth is the allocator's: 2% were seen.
    expected = (live["gpipe"] - live["1f1b"]) * part
    assert peaks["gpipe"] - peaks["1f1b"] == pytest.approx(expected, rel=0.1)
    assert peaks["1f1b"] < peaks["gpipe"] / 4


if __name__ == "__main__":
    print(peak_bytes(sys.argv[1]))
