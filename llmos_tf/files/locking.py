"""Locks that keep two processes from writing to one folder."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from llmos_tf.files.errors import naming

# The file in a folder that is locked while a process writes there.
LOCK_FILE = ".lock"

_POLL_SECONDS = 0.02
# What `flock` says on file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUseError(ValueError):
    """Another process writes to the folder."""


@contextlib.contextmanager
def locked(folder: Path, wait_seconds: float, remedy: str) -> Iterator[bool]:
    """Keeps all other processes and threads that call this out of a folder.

    The operating system frees the lock of a process that ends, however it ends. The lock file names
    the holder, and is removed at the end.

    Args:
        folder: an existing folder.
        wait_seconds: how long to wait for another holder.
        remedy: the end of the error: what the user can do.

    Yields:
        Whether the folder is locked. False on file systems without locks, after a warning.

    Raises:
        FolderInUseError: the other holder did not end in time; names its process and host.
        OSError: the lock file cannot be created.
    """  # noqa: DOC503
    path = folder / LOCK_FILE
    try:
        descriptor = _acquire(path, wait_seconds, remedy)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"The file system of {folder} has no locks ({error.strerror}), so two processes that "
            "write there at the same time can destroy each other's files.",
            stacklevel=2,
        )
        yield False
        return
    try:
        yield True
    finally:
        # While it is still locked: whoever waits for it sees then that it is gone.
        if _is_at(path, descriptor):
            path.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Claims a folder for a program that writes there for as long as it runs.

    Args:
        folder: created if missing; removed at the end, with the parents that were created for it,
            where nothing was written to it.

    Yields:
        Nothing.

    Raises:
        FolderInUseError: another process has claimed it; names the process and its host.
    """  # noqa: DOC502
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder, 0.0, "Wait until it ends, or name another folder."):
            yield
    finally:
        # Not empty: the program has written there.
        with contextlib.suppress(OSError):
            for path in created:
                path.rmdir()


def _acquire(path: Path, wait_seconds: float, remedy: str) -> int:
    """Returns the descriptor of a lock file that is locked, and at its path."""
    deadline = time.monotonic() + wait_seconds
    # Polled, so that the wait has an end and Ctrl-C works.
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with naming(path):
                if _try_lock(path, descriptor):
                    return descriptor
            holder = _holder(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise FolderInUseError(f"The folder {path.parent} is in use by {holder}. {remedy}")
        time.sleep(_POLL_SECONDS)


def _try_lock(path: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if not _is_at(path, descriptor):
        # Its holder ended, and removed it, after it was opened here.
        return False
    _write_holder(descriptor)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname()}
    # On a full disk the holder has no name: what is removed under its lock may free the space.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on the host {holder['host']}"
    except (ValueError, KeyError, TypeError):
        # It has only just locked the file and not yet written its name.
        return "another process"
