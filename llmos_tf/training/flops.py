"""Model FLOP utilisation: what share of the machine's arithmetic the model's products are."""

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
        product measured here. Virtual CPU devices share one machine.
    """
    if "GPU" not in devices[0]:
        return _measured_rate(devices[0]), "fastest float32 matrix product measured here"
    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "")
    words = name.replace("-", " ").split()
    for model, peak in _GPU_PEAKS.items():
        if model in words:
            return peak * len(devices), f"{model} data sheet, dense 16-bit"
    return _measured_rate(devices[0]) * len(devices), "fastest float32 matrix product measured here"


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


def _measured_rate(device: str) -> float:
    """FLOP/s of the fastest square matrix product.

    Fastest of hundreds, since a machine that others use too has slow moments.
    """
    return max(_fastest_product(device, size) for size in (512, 1024))


def _fastest_product(device: str, size: int, seconds: float = 0.7) -> float:
    with tf.device(device):
        x = tf.random.stateless_normal([size, size], seed=[0, 0])

        @tf.function(autograph=False)
        def product():
            return tf.reduce_sum(tf.matmul(x, x))

        product().numpy()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            begin = time.perf_counter()
            product().numpy()
            times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)
