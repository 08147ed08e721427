"""Keras on JAX: `fit` on one device, with DataParallel or with ModelParallel.

The process has KERAS_BACKEND=jax, and XLA_FLAGS that make CPU devices.
"""

import keras
import numpy as np

from llmos_tf.scripts.peers.fit import fit_steps
from llmos_tf.scripts.peers.keras_model import make_model
from llmos_tf.scripts.peers.timing import TakeSteps
from llmos_tf.scripts.peers.workload import Job


def make(job: Job) -> TakeSteps:
    """Makes the run.

    Args:
        job: a ``jax``, ``jax-data`` or ``jax-tensor`` one.

    Returns:
        What takes its steps.
    """
    devices = keras.distribution.list_devices()[: job.devices]
    if job.kind == "jax-data":
        distribution = keras.distribution.DataParallel(devices=devices)
        keras.distribution.set_distribution(distribution)
    elif job.kind == "jax-tensor":
        keras.distribution.set_distribution(_model_parallel(devices))
    # JAX always compiles the step.
    model = make_model(job.workload, jit_compile=True)
    x, y = job.workload.batch()

    def data(count: int) -> dict[str, np.ndarray | int]:
        # The same batch, so many times.
        x_all, y_all = (np.tile(array, (count, 1)) for array in (x, y))
        return {"x": x_all, "y": y_all, "batch_size": len(x)}

    return fit_steps(model, data)


def _model_parallel(devices: list[str]) -> keras.distribution.ModelParallel:
    """Heads, feed-forward columns and vocabulary over the devices."""
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
    layouts = keras.distribution.LayoutMap(mesh)
    for pattern, layout in {
        ".*token_embedding/embeddings": ("model", None),
        ".*(query_key_value|up)/kernel": (None, "model"),
        ".*(query_key_value|up)/bias": ("model",),
        ".*(output|down)/kernel": ("model", None),
    }.items():
        layouts[pattern] = layout
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
