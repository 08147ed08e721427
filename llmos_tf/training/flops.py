"""Model FLOP utilisation: what share of the machine's arithmetic the model's products are."""

import math
import os
import time

import tensorflow as tf

_TERA = 1e12
# Dense peak of one GPU in its 16-bit format, FLOP/s, from the makers' data sheets.
_GPU_PEAKS = {
    "V100": 125e12,
    "T4": 65e12,
    "A10": 125e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40": 181e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(devices: tuple[str, ...]) -> tuple[float, str]:
    """Returns the peak arithmetic rate of the devices together.

    Args:
        devices: their names.

    Returns:
        FLOP/s, and its source: a data sheet for a known GPU, else the fastest float32 matrix
        product measured here. Virtual CPU devices share the cores of one machine.
    """
    if "GPU" not in devices[0]:
        cores = _num_cores()
        rate = cores * _cpu_rate(devices[0])
        return rate, f"fastest float32 matrix product of a core, measured here, on {cores} cores"
    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "")
    words = name.replace("-", " ").split()
    for model, peak in _GPU_PEAKS.items():
        if model in words:
            return peak * len(devices), f"{model} data sheet, dense 16-bit"
    return _gpu_rate(devices[0]) * len(devices), "fastest float32 matrix product measured here"


def describe_peak(rate: float, source: str) -> str:
    """Returns a peak in words.

    Args:
        rate: FLOP/s.
        source: as of `peak_flops`.

    Returns:
        Such as "461 GFLOP/s (fastest float32 matrix product measured here)".
    """
    shown = f"{rate / _TERA:,.0f} TFLOP/s" if rate > 10 * _TERA else f"{rate / 1e9:,.0f} GFLOP/s"
    return f"{shown} ({source})"


def _cpu_rate(device: str, size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of a core that multiplies matrices, by the processor time that the fastest takes.

    Processor time and not time: a machine that others use too, or a process of more threads than
    it gets cores, would appear to have a lower peak in each run.
    """
    product = _product(device, size)
    best = math.inf
    end = time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        begin = time.process_time()
        product().numpy()
        best = min(best, time.process_time() - begin)
    return 2 * size**3 / best


def _gpu_rate(device: str, size: int = 4096, repeats: int = 20) -> float:
    """FLOP/s of the fastest of some products, float32."""
    product = _product(device, size)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        product().numpy()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


def _product(device: str, size: int) -> tf.types.experimental.PolymorphicFunction:
    with tf.device(device):
        x = tf.random.stateless_normal([size, size], seed=[0, 0])

    @tf.function(autograph=False)
    def product():
        with tf.device(device):
            return tf.reduce_sum(tf.matmul(x, x))

    product().numpy()
    return product


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
