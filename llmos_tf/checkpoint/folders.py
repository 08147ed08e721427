"""Folders of checkpoints: their names, how one appears, and how old ones are removed."""

import contextlib
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from llmos_tf.files.locking import locked
from llmos_tf.files.writing import sync_folder

STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
# Folder of the checkpoints in the workdir of a run of llmos-train.
RUN_FOLDER = "checkpoints"

# Prefixes of a folder that is being written or removed, which is never a checkpoint, ...
_WRITING = ".writing-"
_REMOVING = ".removing-"
# ... and of a whole checkpoint that a new one of the same step is about to replace.
_REPLACED = ".replaced-"

# Seconds that a save waits for another one in the same folder.
_WAIT = 600.0


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
        Steps and paths of the folders named so, damaged ones too.
    """
    found = {}
    # Sorted, so that the checkpoint under the step's name comes after one that it replaces. Only
    # that one is there where a process was killed between the two renames of `_replace`.
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        name = _final_name(path) if path.name.startswith(_REPLACED) else path.name
        match = re.fullmatch(r"step-(\d+)", name)
        if match and name == step_name(int(match[1])) and path.is_dir():
            found[int(match[1])] = path
    return sorted(found.items())


def latest_checkpoint(directory: str | Path) -> Path | None:
    """Returns the checkpoint of the highest step.

    Args:
        directory: what `--checkpoint` of the programs takes: the folder that `save_checkpoint`
            writes to, the workdir of a run of llmos-train, or a checkpoint, which is returned. It
            may not exist.

    Returns:
        Its path, or None where there is no checkpoint. A folder without `state.json` is none.

    Example:
        >>> latest_checkpoint("run")
        PosixPath('run/step-00000120')
    """
    directory = Path(directory)
    if (directory / STATE_FILE).exists():
        return directory
    found = _with_state(directory / RUN_FOLDER) or _with_state(directory)
    return found[-1] if found else None


@contextlib.contextmanager
def writing_alone(directory: Path) -> Iterator[None]:
    """Keeps other writers out of a folder, after it has removed what a killed one left there.

    Args:
        directory: the folder of the checkpoints; created if missing.

    Yields:
        Nothing.

    Raises:
        FolderInUseError: another process is still saving there after ten minutes.
    """  # noqa: DOC502
    directory.mkdir(parents=True, exist_ok=True)
    remedy = f"This save has waited {_WAIT:.0f} s. End that process, or save to another folder."
    with locked(directory, _WAIT, remedy) as is_locked:
        if is_locked:
            _recover(directory)
        yield


@contextlib.contextmanager
def appearing(final: Path) -> Iterator[Path]:
    """Creates a folder that appears complete or not at all.

    Args:
        final: its path. A folder of that name is replaced, after the new one is complete.

    Yields:
        A temporary folder beside it to write into. When the context ends it gets the final name;
        on an exception it is removed, and all else is as it was.
    """
    temporary = _beside(final, _WRITING)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        _replace(final, temporary)
    finally:
        # Where all went well it has the final name by now, and nothing is left to remove.
        _delete(temporary)
    sync_folder(final.parent)


def remove_older(directory: Path, newest: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints.

    Args:
        directory: the folder of the checkpoints.
        newest: the one that was just written, which stays whatever its step is.
        keep: how many stay, at least 1; None for all.
    """
    others = [path for path in _with_state(directory) if path != newest]
    num_removed = 0 if keep is None else max(0, len(others) - (keep - 1))
    for path in others[:num_removed]:
        # Renamed first: half a removal leaves no half a checkpoint.
        _delete(path.rename(_beside(path, _REMOVING)))


def _with_state(directory: Path) -> list[Path]:
    """The checkpoints in a folder that have a `state.json`, the lowest step first."""
    return [path for _, path in list_checkpoints(directory) if (path / STATE_FILE).exists()]


def _recover(directory: Path) -> None:
    """Removes or renames what processes that were killed have left. Nobody else writes here."""
    for path in list(directory.iterdir()):
        if path.name.startswith(f"{_REPLACED}step-"):
            final = path.with_name(_final_name(path))
            if not final.exists():
                path.rename(final)
                continue
        elif not path.name.startswith((f"{_WRITING}step-", f"{_REMOVING}step-")):
            continue
        _delete(path)


def _replace(final: Path, complete: Path) -> None:
    """Renames a complete folder; one that is in the way is put aside, and back if that fails.

    A process may be killed between the renames: `list_checkpoints` and `_recover` know the name.
    """
    if not final.exists():
        complete.rename(final)
        return
    aside = _beside(final, _REPLACED)
    try:
        final.rename(aside)
        complete.rename(final)
    except BaseException:
        if aside.exists() and not final.exists():
            aside.rename(final)
        raise
    _delete(aside)


def _delete(folder: Path) -> None:
    """Removes a folder that is no checkpoint any more, as far as the file system allows."""
    # Over NFS a file that somebody still reads stays for a while. `_recover` tries again.
    shutil.rmtree(folder, ignore_errors=True)


def _beside(path: Path, prefix: str) -> Path:
    """A path for the same checkpoint in another state; no other process has the name."""
    return path.with_name(f"{prefix}{_final_name(path)}-{uuid.uuid4().hex[:8]}")


def _final_name(path: Path) -> str:
    """The name without what `_beside` adds, such as ".replaced-" and "-0a1b2c3d"."""
    return re.sub(r"^\.[a-z]+-(.*)-[0-9a-f]+$", r"\1", path.name)
