"""One run of llmos-benchmark, in a process of its own.

It is given what to run as JSON, takes the first step, and then takes as many more as it is told
to, line by line; in between it rests, so that the runs can take turns. It answers in JSON.
"""

import json
import sys
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import devices
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.memory import peak_resident_bytes
from llmos_tf.mesh import Mesh
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training import make_train_step


def make_step(job: dict[str, Any]) -> Any:
    """Makes model, batch and train step.

    Args:
        job: what llmos-benchmark sent: `mesh`, `options`, `model`, `global_batch`,
            `threads_per_device`, `seed`.

    Returns:
        A function that takes one step and returns the loss.
    """
    mesh = Mesh.from_string(job["mesh"])
    if job["threads_per_device"]:
        threads = tf.config.threading
        threads.set_intra_op_parallelism_threads(job["threads_per_device"])
        threads.set_inter_op_parallelism_threads(mesh.size)
    if not tf.config.list_physical_devices("GPU"):
        devices.configure_virtual_cpus(mesh.size)
    strategy = MeshStrategy(mesh, **job["options"])
    config = GPTConfig(**job["model"])
    keras.utils.set_random_seed(job["seed"])
    with strategy.scope():
        model = GPT(config)
        optimizer = keras.optimizers.AdamW(1e-3)
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    rng = np.random.default_rng(job["seed"])
    shape = (job["global_batch"], config.max_positions)
    x, y = (tf.constant(rng.integers(0, config.vocab_size, shape)) for _ in range(2))
    return lambda: float(step(x, y))


def main() -> None:
    """Serves one run until its input ends."""
    job = json.loads(sys.argv[1])
    begin = time.perf_counter()
    step = make_step(job)
    made = time.perf_counter()
    loss = step()
    first = time.perf_counter()
    _answer(setup=made - begin, first_step=first - made, loss=loss)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        _answer(times=times, peak_bytes=peak_resident_bytes())


def _answer(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
