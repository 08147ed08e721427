"""Model FLOP utilisation: what share of the machine's arithmetic the model's products are."""

import time

import tensorflow as tf

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
        FLOP/s, and where the figure is from: a data sheet for a known GPU, else the rate of a
        float32 matrix product measured here. Virtual CPU devices share one machine.
    """
    if "GPU" not in devices[0]:
        return _measured_rate(devices[0]), "measured float32 matrix product"
    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "")
    words = name.replace("-", " ").split()
    for model, peak in _GPU_PEAKS.items():
        if model in words:
            return peak * len(devices), f"{model} data sheet, 16-bit"
    return _measured_rate(devices[0]) * len(devices), "measured float32 matrix product"


def _measured_rate(device: str, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    with tf.device(device):
        x = tf.random.stateless_normal([size, size], seed=[0, 0])

        @tf.function(autograph=False)
        def product():
            return tf.reduce_sum(tf.matmul(x, x))

        product().numpy()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            product().numpy()
            times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)
