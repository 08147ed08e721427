"""Peak rates of devices."""

import subprocess
import sys

import pytest
import tensorflow as tf

from llmos_tf.training import flops

pytestmark = pytest.mark.fast


@pytest.fixture
def gpu(monkeypatch):
    """Makes a GPU appear, by the name that its driver gives."""

    def appear(name):
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
        monkeypatch.setattr(
            tf.config.experimental, "get_device_details", lambda gpu: {"device_name": name}
        )
        monkeypatch.setattr(flops, "_gpu_rate", lambda device: 1.5)

    return appear


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_known_gpus(gpu, name, peak):
    """Fails if A10 is found in A100, L4 in L40, or the devices are not counted."""
    gpu(name)
    rate, source = flops.peak_flops(("/GPU:0", "/GPU:1"))
    assert rate == 2 * peak
    assert "data sheet" in source


def test_an_unknown_gpu_is_measured(gpu):
    """Fails if a new GPU gets another one's figure, or stops the run."""
    gpu("NVIDIA L40S")
    assert flops.peak_flops(("/GPU:0", "/GPU:1")) == (
        3.0,
        "fastest float32 matrix product measured here",
    )


def test_a_core_is_measured_whatever_others_do():
    """Fails if the rate is off by orders, or is half as high while others use the machine: a core
    does between 1e9 and 1e12 operations a second."""
    quiet, source = flops.peak_flops(("/CPU:0", "/CPU:1"))
    cores = flops._num_cores()
    assert 1e9 < quiet / cores < 1e12
    assert source.endswith(f"of a core, measured here, on {cores} cores")
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * cores)]
    try:
        busy, _ = flops.peak_flops(("/CPU:0", "/CPU:1"))
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert busy == pytest.approx(quiet, rel=0.3)


def test_cpu_devices_are_measured_once(monkeypatch):
    """Fails if the figure of one machine is multiplied by the virtual devices that share it."""
    monkeypatch.setattr(flops, "_cpu_rate", lambda device: 1.5)
    monkeypatch.setattr(flops, "_num_cores", lambda: 4)
    assert flops.peak_flops(("/CPU:0", "/CPU:1", "/CPU:2"))[0] == 6.0


def test_a_peak_in_words():
    """Fails if utilisation is of a figure that nobody can compare with a data sheet."""
    assert flops.describe_peak(461.2e9, "measured") == "461 GFLOP/s (measured)"
    assert flops.describe_peak(8 * 989e12, "H100") == "7,912 TFLOP/s (H100)"
