"""Training checkpoints that know nothing of the mesh they were written on.

A checkpoint is a folder ``step-00000120`` with

- ``model.safetensors``: all variables of the model, the states of its seed generators too;
- ``optimizer.safetensors``: all variables of the optimizer, if there is one: iterations, learning
  rate, slots, loss scale;
- ``state.json``: format version, step, the model's configuration, the list of all variables with
  shape, dtype and checksum, and what the caller adds, such as the position of the data.

Tensors are stored whole, so what a mesh wrote can go on in another mesh or on one device. A
checkpoint appears under its name when all of it is on disk, and never before.

This version is synchronous, and one process that holds all ranks writes it: training waits while
full tensors are gathered on the host, one variable at a time. Sharded and asynchronous writing
belong to a later version.

`latest_checkpoint` and `load_config` need no TensorFlow; the other names import it when they are
first used.

Example:
    >>> save_checkpoint("run", model, step=120, extra={"batches": batches.state()})
    PosixPath('run/step-00000120')
    >>> with MeshStrategy(Mesh(fsdp=2)).scope():  # not the mesh that wrote it
    ...     model = GPT(load_config(latest_checkpoint("run")))
    ...     model.compile("adamw", TokenCrossEntropy())
    >>> restore_checkpoint(latest_checkpoint("run"), model).step
    120
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmos_tf.checkpoint.folders import latest_checkpoint
from llmos_tf.checkpoint.manifest import load_config

if TYPE_CHECKING:
    from llmos_tf.checkpoint.restoring import RestoredState, restore_checkpoint
    from llmos_tf.checkpoint.saving import save_checkpoint

__all__ = [
    "RestoredState",
    "latest_checkpoint",
    "load_config",
    "restore_checkpoint",
    "save_checkpoint",
]

# Names that need TensorFlow, and the module that defines each.
_LAZY = {
    "RestoredState": "llmos_tf.checkpoint.restoring",
    "restore_checkpoint": "llmos_tf.checkpoint.restoring",
    "save_checkpoint": "llmos_tf.checkpoint.saving",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
