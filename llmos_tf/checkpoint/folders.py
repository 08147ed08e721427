"""Folders of checkpoints: their names, how one appears, and how old ones go."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# Folder of the checkpoints in the workdir of a run of llmos-train.
RUN_FOLDER = "checkpoints"

# Of a folder that is being written or removed. Never the name of a checkpoint.
_WRITING = ".writing-"
_REMOVING = ".removing-"


def step_name(step: int) -> str:
    """Returns the name of a step's checkpoint.

    Args:
        step: number of the step.

    Returns:
        Such as ``step-00000120``.
    """
    return f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Returns the checkpoints in a folder, the lowest step first.

    Args:
        directory: a folder, which may not exist.

    Returns:
        Steps and paths. What has another name, or no `state.json`, is none.
    """
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.name == step_name(int(match[1])) and (path / STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """Returns the checkpoint of the highest step.

    Args:
        directory: what `--checkpoint` of the programs takes: the folder that `save_checkpoint`
            writes to, the workdir of a run of llmos-train, or a checkpoint, which is returned. It
            may not exist.

    Returns:
        Its path, or None where there is no checkpoint.

    Example:
        >>> latest_checkpoint("run")
        PosixPath('run/step-00000120')
    """
    directory = Path(directory)
    if (directory / STATE_FILE).is_file():
        return directory
    found = list_checkpoints(directory / RUN_FOLDER) or list_checkpoints(directory)
    return found[-1][1] if found else None


@contextlib.contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """Lets a folder appear complete or not at all.

    Args:
        final: where it shall be. A folder of that name is replaced, after the new one is complete.

    Yields:
        A temporary folder beside it to write into. When the context ends it gets the final name;
        on an exception it is removed, and all else is as it was.
    """
    temporary = _beside(final, _WRITING)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_folder(temporary)
        _replace(final, temporary)
    finally:
        # Where all went well it has the final name by now, and nothing is left to remove.
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(final.parent)


def remove_older(directory: Path, newest: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints, and what an interrupted run left half-written.

    Args:
        directory: the folder of the checkpoints.
        newest: the one that was just written, which stays whatever its step is.
        keep: how many stay, at least 1; None for all.
    """
    others = [path for _, path in list_checkpoints(directory) if path != newest]
    num_removed = 0 if keep is None else max(0, len(others) - (keep - 1))
    for path in others[:num_removed]:
        # Renamed first: half a removal leaves no half a checkpoint.
        path.rename(_beside(path, _REMOVING))
    for path in directory.iterdir():
        if path.name.startswith((f"{_WRITING}step-", f"{_REMOVING}step-")):
            shutil.rmtree(path, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk.

    Args:
        path: the folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(final: Path, complete: Path) -> None:
    """Renames a complete folder; one that is in the way is put aside, and back if that fails."""
    if not final.exists():
        complete.rename(final)
        return
    aside = _beside(final, _REMOVING)
    try:
        final.rename(aside)
        complete.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _beside(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{path.name}-{uuid.uuid4().hex[:8]}")
