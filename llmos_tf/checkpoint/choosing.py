"""The newest checkpoint in a folder that is whole. No TensorFlow."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from llmos_tf.checkpoint.errors import DamagedCheckpointError
from llmos_tf.checkpoint.folders import list_checkpoints

_Result = TypeVar("_Result")


class SkippedCheckpoint(NamedTuple):
    """A checkpoint that was not restored.

    Attributes:
        path: its folder.
        reason: the message of the error.
    """

    path: Path
    reason: str


def read_newest(
    directory: Path, read: Callable[[Path], _Result]
) -> tuple[Path, _Result, tuple[SkippedCheckpoint, ...]]:
    """Reads the newest checkpoint in a folder that is not damaged.

    Args:
        directory: the folder that `save_checkpoint` writes to.
        read: reads a checkpoint, and raises `DamagedCheckpointError` for a damaged one.

    Returns:
        The checkpoint, what `read` returned, and newer ones, which are damaged, the newest first.

    Raises:
        FileNotFoundError: there is no checkpoint in the folder.
        DamagedCheckpointError: all of them are damaged.
    """
    skipped = []
    for _, path in reversed(list_checkpoints(directory)):
        try:
            return path, read(path), tuple(skipped)
        except DamagedCheckpointError as error:
            skipped.append(SkippedCheckpoint(path, str(error)))
    if not skipped:
        raise FileNotFoundError(f"There is no checkpoint in {str(directory)!r}.")
    reasons = " ".join(f"{path.name}: {reason}" for path, reason in skipped)
    raise DamagedCheckpointError(f"No checkpoint in {directory} is whole. {reasons}")
