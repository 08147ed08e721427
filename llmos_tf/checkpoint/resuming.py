"""Restoring the newest checkpoint of a run that is whole."""

from pathlib import Path
from typing import Any, NamedTuple

import keras

from llmos_tf.checkpoint.choosing import SkippedCheckpoint, read_newest
from llmos_tf.checkpoint.restoring import RestoredState, restore_checkpoint


class ResumedState(NamedTuple):
    """What `restore_latest` found.

    Attributes:
        step: number of steps that were done.
        extra: what `save_checkpoint` was given.
        path: the checkpoint that was restored.
        skipped: newer ones, which are damaged, the newest first.
    """

    step: int
    extra: dict[str, Any]
    path: Path
    skipped: tuple[SkippedCheckpoint, ...]


def restore_latest(
    directory: str | Path,
    model: keras.Model,
    *,
    weights_only: bool = False,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> ResumedState:
    """Restores the newest checkpoint in a folder that is whole.

    All bytes of a checkpoint are verified before the first value is assigned. A damaged one is
    skipped; one of another model or optimizer is an error, as its older ones would be too.

    Args:
        directory: the folder that `save_checkpoint` writes to.
        model: as for `restore_checkpoint`.
        weights_only: as for `restore_checkpoint`.
        optimizer: as for `restore_checkpoint`.

    Returns:
        The step, what else was saved, and the checkpoints that were skipped with the reasons.

    Raises:
        FileNotFoundError: there is no checkpoint in the folder.
        DamagedCheckpointError: none of them is whole; the model is what it was.
        ValueError: the newest whole one is of another model or optimizer.

    Example:
        >>> state = restore_latest("run", model)
        >>> for path, reason in state.skipped:
        ...     print(f"Skipped {path}: {reason}")
    """  # noqa: DOC502

    def restore(path: Path) -> RestoredState:
        return restore_checkpoint(path, model, weights_only=weights_only, optimizer=optimizer)

    path, state, skipped = read_newest(Path(directory), restore)
    return ResumedState(state.step, state.extra, path, skipped)
