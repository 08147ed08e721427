"""TensorFlow's DTensor: the batch or the model cut over a mesh of devices.

DTensor has no layers or optimizers for Keras 3, so the model and AdamW are written out. Code is
that of one device with global shapes; layouts of weights and data say what is cut, and `relayout`
where a sum over devices belongs.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.experimental import dtensor

from llmos_tf.config import GPTConfig
from llmos_tf.scripts.peers.keras_tensorflow import configure_devices
from llmos_tf.scripts.peers.timing import TakeSteps, timed
from llmos_tf.scripts.peers.workload import Job, fused_by_heads

# Layouts over the axis "model", by the end of a name; the others are whole everywhere.
_CUT = {
    "token_embedding/table": ("model", None),
    "query_key_value/kernel": (None, "model"),
    "query_key_value/bias": ("model",),
    "attention/output/kernel": ("model", None),
    "up/kernel": (None, "model"),
    "up/bias": ("model",),
    "down/kernel": ("model", None),
}

Tensors = dict[str, tf.Tensor]


def make(job: Job) -> TakeSteps:
    """Makes the run.

    Args:
        job: a ``dtensor-data`` or ``dtensor-tensor`` one.

    Returns:
        What takes its steps.
    """
    configure_devices(job)
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    devices = [f"{kind}:{i}" for i in range(job.devices)]
    sizes = (job.devices, 1) if job.kind == "dtensor-data" else (1, job.devices)
    mesh = dtensor.create_mesh(list(zip(("batch", "model"), sizes, strict=True)), devices=devices)

    def place(value: np.ndarray, *dims: str | None) -> tf.Tensor:
        whole = dtensor.copy_to_mesh(value, dtensor.Layout.replicated(mesh, rank=value.ndim))
        sharding = [dim or dtensor.UNSHARDED for dim in dims or (None,) * value.ndim]
        return dtensor.relayout(whole, dtensor.Layout(sharding, mesh))

    def variable(name: str, value: np.ndarray) -> dtensor.DVariable:
        cut = [dims for end, dims in _CUT.items() if name.endswith(end)]
        return dtensor.DVariable(place(value, *(cut[0] if cut else ())))

    values = {name: _flat(name, value) for name, value in job.workload.weights().items()}
    weights = {name: variable(name, value) for name, value in values.items()}
    moments = [
        {name: variable(name, np.zeros_like(value)) for name, value in values.items()}
        for _ in range(2)
    ]
    x, y = (place(array, "batch", None) for array in job.workload.batch())
    config, hyper = job.workload.config, job.workload.optimizer

    def loss_of(weights: Tensors, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        logits = _forward(config, weights, x, lambda value: _summed(value, mesh))
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        return tf.reduce_mean(losses)

    @tf.function(autograph=False)
    def step(x, y, rate):
        read = {name: weight.read_value() for name, weight in weights.items()}
        with tf.GradientTape() as tape:
            tape.watch(read)
            loss = loss_of(read, x, y)
        gradients = tape.gradient(loss, read)
        for name, gradient in gradients.items():
            _update(name, read[name], gradient, weights, moments, rate, hyper)
        return loss

    steps = iter(range(1, 2**31))

    def take_one() -> float:
        t = next(steps)
        corrected = math.sqrt(1 - hyper["beta_2"] ** t) / (1 - hyper["beta_1"] ** t)
        rate = place(np.float32(hyper["learning_rate"] * corrected))
        return float(step(x, y, rate))

    return timed(take_one)


def _flat(name: str, value: np.ndarray) -> np.ndarray:
    """Kernels as matrices, query, key and value by heads."""
    if "query_key_value" in name:
        return fused_by_heads(value)
    return value.reshape(-1, value.shape[-1]) if name.endswith("kernel") else value


def _summed(value: tf.Tensor, mesh: dtensor.Mesh) -> tf.Tensor:
    """The sum over "model" of what a row-cut product has left on each device."""
    return dtensor.relayout(
        value, dtensor.Layout.batch_sharded(mesh, "batch", rank=value.shape.rank)
    )


def _forward(
    config: GPTConfig, w: Tensors, x: tf.Tensor, summed: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Logits ``[B, T, V]`` of tokens ``[B, T]``."""
    batch, length = x.shape
    width = config.hidden_size
    stream = summed(tf.gather(w["token_embedding/table"], x)) + w["position_embedding/table"]
    causal = np.tril(np.ones((length, length), np.bool_))
    # As a number to add, so that it is a constant and no op.
    mask = np.where(causal, 0.0, -1e9).astype(np.float32)

    def norm(value, name):
        mean, variance = tf.nn.moments(value, -1, keepdims=True)
        scale = tf.math.rsqrt(variance + config.layer_norm_epsilon) * w[f"{name}/gamma"]
        return value * scale + (w[f"{name}/beta"] - mean * scale)

    def dense(value, name):
        return tf.matmul(value, w[f"{name}/kernel"])

    for i in range(config.num_layers):
        block = f"block_{i}"
        y = norm(stream, f"{block}/attention_norm")
        name = f"{block}/attention/query_key_value"
        fused = dense(y, name) + w[f"{name}/bias"]
        fused = tf.reshape(fused, [batch, length, config.num_heads, 3, config.head_dim])
        q, k, v = tf.unstack(tf.transpose(fused, [0, 2, 3, 1, 4]), axis=2)
        scores = tf.matmul(q / math.sqrt(config.head_dim), k, transpose_b=True) + mask
        y = tf.transpose(tf.matmul(tf.nn.softmax(scores), v), [0, 2, 1, 3])
        name = f"{block}/attention/output"
        y = dense(tf.reshape(y, [batch, length, width]), name)
        stream += summed(y) + w[f"{name}/bias"]
        y = norm(stream, f"{block}/feed_forward_norm")
        name = f"{block}/feed_forward/up"
        y = _gelu(dense(y, name) + w[f"{name}/bias"])
        name = f"{block}/feed_forward/down"
        stream += summed(dense(y, name)) + w[f"{name}/bias"]
    return tf.matmul(norm(stream, "final_norm"), w["token_embedding/table"], transpose_b=True)


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """By tanh, as products: TensorFlow's own has a slow power in it."""
    return 0.5 * x * (1.0 + tf.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def _update(name, weight, gradient, weights, moments, rate, hyper) -> None:
    """AdamW. What was assigned is not read again: in one function DTensor gives the old value."""
    first, second = (moment[name] for moment in moments)
    gradient = tf.convert_to_tensor(gradient)
    m = first.read_value()
    m += (gradient - m) * (1 - hyper["beta_1"])
    v = second.read_value()
    v += (tf.square(gradient) - v) * (1 - hyper["beta_2"])
    first.assign(m)
    second.assign(v)
    decayed = weight * (1 - hyper["learning_rate"] * hyper["weight_decay"])
    weights[name].assign(decayed - rate * m / (tf.sqrt(v) + hyper["epsilon"]))
