"""Training checkpoints that know nothing of the mesh they were written on.

A checkpoint is a folder ``step-00000120`` with

- ``model.safetensors``: all variables of the model, the states of its seed generators too;
- ``optimizer.safetensors``: all variables of the optimizer, if there is one: iterations, learning
  rate, slots, loss scale;
- ``state.json``: format version, step, the model's configuration, the list of all variables with
  shape, dtype and checksum, what the caller adds, such as the position of the data, and a checksum
  of all this.

Tensors are stored whole, so that a run can continue on another mesh or on one device. A checkpoint
appears under its name when all of it is on disk, and never before. While a process saves it locks
the folder; what a killed one has left is removed by the next save. `restore_latest` takes the
newest checkpoint that is whole.

This version is synchronous, and one process writes: training waits while full tensors are gathered
on the host, one variable at a time. Sharded and asynchronous writing belong to a later version.

`latest_checkpoint`, `load_config` and the errors need no TensorFlow; the functions that save and
restore import it when they are first used.

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

from llmos_tf.checkpoint.choosing import SkippedCheckpoint
from llmos_tf.checkpoint.errors import DamagedCheckpointError
from llmos_tf.checkpoint.folders import latest_checkpoint
from llmos_tf.checkpoint.manifest import load_config
from llmos_tf.files.locking import FolderInUseError

if TYPE_CHECKING:
    from llmos_tf.checkpoint.restoring import RestoredState, restore_checkpoint
    from llmos_tf.checkpoint.resuming import ResumedState, restore_latest
    from llmos_tf.checkpoint.saving import save_checkpoint

__all__ = [
    "DamagedCheckpointError",
    "FolderInUseError",
    "RestoredState",
    "ResumedState",
    "SkippedCheckpoint",
    "latest_checkpoint",
    "load_config",
    "restore_checkpoint",
    "restore_latest",
    "save_checkpoint",
]

# Names that need TensorFlow, and the module that defines each.
_LAZY = {
    "RestoredState": "llmos_tf.checkpoint.restoring",
    "ResumedState": "llmos_tf.checkpoint.resuming",
    "restore_checkpoint": "llmos_tf.checkpoint.restoring",
    "restore_latest": "llmos_tf.checkpoint.resuming",
    "save_checkpoint": "llmos_tf.checkpoint.saving",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
