"""Ours: a GPT of `llmos_tf.models` on a mesh, by the bare train step or by `fit`."""

import keras
import numpy as np
import tensorflow as tf

from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.mesh import Mesh
from llmos_tf.models import GPT
from llmos_tf.scripts.peers.fit import fit_steps
from llmos_tf.scripts.peers.keras_tensorflow import configure_devices, in_memory
from llmos_tf.scripts.peers.timing import TakeSteps, timed
from llmos_tf.scripts.peers.workload import Job
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training import make_train_step


def make(job: Job) -> TakeSteps:
    """Makes the run.

    Args:
        job: a run on a mesh.

    Returns:
        What takes its steps.
    """
    configure_devices(job)
    strategy = MeshStrategy(Mesh.from_string(job.mesh), **job.options)
    with strategy.scope():
        model = GPT(job.workload.config)
        optimizer = keras.optimizers.AdamW(**job.workload.optimizer)
    _load(model, job.workload.weights())
    x, y = job.workload.batch()
    if job.kind == "fit":
        model.compile(optimizer, TokenCrossEntropy())
        dataset = in_memory(x, y)
        return fit_steps(model, lambda count: {"x": dataset, "steps_per_epoch": count})
    step = make_train_step(model, optimizer, TokenCrossEntropy())
    x, y = tf.constant(x), tf.constant(y)
    return timed(lambda: float(step(x, y)))


def _load(model: GPT, weights: dict[str, np.ndarray]) -> None:
    for variable in model.trainable_variables:
        # Paths begin with the name of the model.
        variable.assign(weights[variable.path.partition("/")[2]])
