"""The kinds of runs beside ours: what each is called, takes, and needs.

No framework is imported.
"""

import importlib.util
import os
from dataclasses import dataclass, field

from llmos_tf.scripts.peers.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of run.

    Args:
        module: of this package, in which it is made.
        summary: what it is, for --help.
        needs: package that has to be installed.
        splits: what a number of devices has to divide, "batch" or "model"; "layers" where it cuts
            the blocks into stages; None for one device.
        options: what it takes besides.
        in_processes: whether each device is a process.
        environment: of its processes.
    """

    module: str
    summary: str
    needs: str | None = None
    splits: str | None = None
    options: tuple[str, ...] = ()
    in_processes: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        """Returns what is to be done before it can run, or None where nothing is."""
        if self.needs is None or importlib.util.find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed: pip install '.[bench]'"

    def check(self, workload: Workload, devices: int, options: dict[str, int | bool]) -> None:
        """Checks that it can run a workload.

        Args:
            workload: what is trained.
            devices: how many.
            options: what the run says besides.

        Raises:
            ValueError: a number that the devices or microbatches do not divide.
        """
        config, parts = workload.config, options.get("microbatches", 1)
        if self.splits == "batch":
            parts = devices
        sizes = {"--global_batch": (workload.global_batch, parts)}
        if self.splits == "model":
            sizes["--num_heads"] = (config.num_heads, devices)
            sizes["--vocab_size"] = (config.vocab_size, devices)
        for name, (size, ways) in sizes.items():
            if size % ways:
                raise ValueError(f"{name}={size} is cut into {ways} parts. Take a multiple.")
        if self.splits == "layers" and not devices <= min(config.num_layers, parts):
            raise ValueError(
                f"{devices} stages need as many blocks and microbatches at least. Received: "
                f"--num_layers={config.num_layers}, microbatches={parts}."
            )


_JAX = {
    "module": "keras_jax",
    "needs": "jax",
    # Not all of a GPU's memory at once: other runs rest on it.
    "environment": {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
}
_TORCH = {"module": "torch_train", "needs": "torch"}
_TORCH_RANKS = {**_TORCH, "in_processes": True}

KINDS = {
    "keras": Kind(
        module="keras_tensorflow",
        summary="stock Keras on TensorFlow, fit on one device",
        options=("jit",),
    ),
    "mirrored": Kind(
        module="keras_tensorflow",
        summary="the same under tf.distribute.MirroredStrategy",
        splits="batch",
        options=("jit",),
    ),
    "dtensor-data": Kind(
        module="dtensor", summary="TensorFlow's DTensor, the batch cut", splits="batch"
    ),
    "dtensor-tensor": Kind(
        module="dtensor", summary="TensorFlow's DTensor, the model cut", splits="model"
    ),
    "jax": Kind(**_JAX, summary="Keras on JAX, fit on one device"),
    "jax-data": Kind(
        **_JAX, summary="the same with keras.distribution.DataParallel", splits="batch"
    ),
    "jax-tensor": Kind(
        **_JAX, summary="the same with keras.distribution.ModelParallel", splits="model"
    ),
    "torch": Kind(**_TORCH, summary="PyTorch, one process", options=("compile",)),
    "torch-ddp": Kind(
        **_TORCH_RANKS,
        summary="PyTorch's DistributedDataParallel",
        splits="batch",
        options=("compile",),
    ),
    "torch-fsdp": Kind(
        **_TORCH_RANKS,
        summary="PyTorch's FSDP2, fully_shard",
        splits="batch",
        options=("compile",),
    ),
    "torch-tensor": Kind(
        **_TORCH_RANKS,
        summary="PyTorch's torch.distributed.tensor.parallel",
        splits="model",
    ),
    "torch-pipe": Kind(
        **_TORCH_RANKS | {"module": "torch_pipeline"},
        summary="PyTorch's torch.distributed.pipelining, 1F1B",
        splits="layers",
        options=("microbatches",),
    ),
}


def form(name: str) -> str:
    """Returns how a run of a kind is written.

    Args:
        name: of the kind.

    Returns:
        Such as ``torch-pipe=N[:microbatches=M]``.
    """
    kind = KINDS[name]
    options = ",".join("microbatches=M" if one == "microbatches" else one for one in kind.options)
    return name + "=N" * (kind.splits is not None) + f"[:{options}]" * bool(options)


def parse(name: str, size: str, rest: str) -> tuple[int, dict[str, int | bool]]:
    """Reads what follows the name of a kind.

    Args:
        name: of the kind.
        size: between its = and its colon; may be empty.
        rest: after its colon.

    Returns:
        Number of devices, and options.

    Raises:
        ValueError: something that the kind does not take.
    """
    kind = KINDS[name]
    is_number = size.isdecimal() and int(size) > 0
    if is_number != (kind.splits is not None) or (size and not is_number):
        raise ValueError(f"It is written {form(name)}.")
    devices = int(size) if is_number else 1
    options: dict[str, int | bool] = {}
    for item in filter(None, rest.split(",")):
        option, equals, value = item.partition("=")
        # Only one of them has a value.
        is_count = value.isdecimal() and int(value) > 0
        fits = is_count if option == "microbatches" else not equals
        if option not in kind.options or not fits:
            raise ValueError(f"{item!r} does not fit: it is written {form(name)}.")
        options[option] = int(value) if equals else True
    if "microbatches" in kind.options:
        options.setdefault("microbatches", devices)
    return devices, options


def environment(name: str, devices: int) -> dict[str, str]:
    """Returns the environment of the processes of a run, of ours too.

    Args:
        name: of the kind, or another name for one of ours.
        devices: how many.

    Returns:
        This process's environment with some more.
    """
    # Not all of a GPU's memory at once: other runs rest on it.
    ours = {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
    if name not in KINDS:
        return {**os.environ, "KERAS_BACKEND": "tensorflow", **ours}
    more = {"KERAS_BACKEND": "tensorflow", **ours, **KINDS[name].environment}
    if KINDS[name].needs == "jax":
        flags = os.environ.get("XLA_FLAGS", "")
        more["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}".strip()
    return {**os.environ, **more}
