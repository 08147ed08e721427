"""Writes of files that appear as a whole: a reader finds the old content or the new one."""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from llmos_tf.files.errors import naming


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes or replaces a file in one step, after all of it is on disk.

    The content goes to a temporary file in the same folder, which then gets the name. After an
    error the file is as it was. A pipe or a device, such as /dev/stdout, is written to directly.

    Args:
        path: the file; a symbolic link stays, and its target is replaced.
        content: all its bytes.

    Raises:
        OSError: it cannot be written; the error names the path.
    """  # noqa: DOC502
    with naming(path):
        if Path(path).exists() and not _is_replaceable(Path(path)):
            _write_directly(path, content)
            return
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name[:100]}-{uuid.uuid4().hex[:8]}")
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            # Where all went well it has its final name by now.
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes or replaces a JSON file in one step, as `write_bytes` does.

    Args:
        path: the file.
        value: what JSON can hold.

    Raises:
        OSError: it cannot be written; the error names the path.
    """  # noqa: DOC502
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on disk.

    Args:
        path: the folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_replaceable(path: Path) -> bool:
    """Whether it is a regular file of its own, which /dev/stdout in a redirected program is not."""
    return path.is_file() and not str(path.absolute()).startswith("/dev/")


def _write_directly(path: str | os.PathLike[str], content: bytes) -> None:
    # O_NONBLOCK: opening a FIFO that nobody reads is an error then, instead of a wait for ever.
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        file.write(content)
