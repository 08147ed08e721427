"""Stock Keras on TensorFlow: `fit` on one device, or under `tf.distribute.MirroredStrategy`."""

import contextlib

import numpy as np
import tensorflow as tf

from llmos_tf import devices
from llmos_tf.scripts.peers.fit import fit_steps
from llmos_tf.scripts.peers.keras_model import make_model
from llmos_tf.scripts.peers.timing import TakeSteps
from llmos_tf.scripts.peers.workload import Job


def make(job: Job) -> TakeSteps:
    """Makes the run.

    Args:
        job: a ``keras`` or a ``mirrored`` one.

    Returns:
        What takes its steps.
    """
    configure_devices(job)
    scope = contextlib.nullcontext()
    if job.kind == "mirrored":
        kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        names = [f"{kind}:{i}" for i in range(job.devices)]
        scope = tf.distribute.MirroredStrategy(names).scope()
    with scope:
        model = make_model(job.workload, bool(job.options.get("jit", False)))
    dataset = in_memory(*job.workload.batch())
    return fit_steps(model, lambda count: {"x": dataset, "steps_per_epoch": count})


def configure_devices(job: Job) -> None:
    """Makes the devices of a run on TensorFlow; before TensorFlow starts them.

    Args:
        job: says how many, and their threads.
    """
    if job.threads_per_device:
        threads = tf.config.threading
        threads.set_intra_op_parallelism_threads(job.threads_per_device)
        threads.set_inter_op_parallelism_threads(job.devices)
    if not tf.config.list_physical_devices("GPU"):
        devices.configure_virtual_cpus(job.devices)


def in_memory(x: np.ndarray, y: np.ndarray) -> tf.data.Dataset:
    """Returns the batch, again and again, as `fit` takes it.

    Args:
        x: tokens.
        y: the tokens that follow.

    Returns:
        A dataset of global batches without end.
    """
    rows = tf.data.Dataset.from_tensor_slices((x, y))
    return rows.batch(len(x), drop_remainder=True).repeat().prefetch(tf.data.AUTOTUNE)
