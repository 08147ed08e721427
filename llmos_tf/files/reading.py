"""Reads of files that may be missing, damaged, huge, or no files at all."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from llmos_tf.files.errors import naming

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Checks that a path is a regular file: opening a FIFO would wait for a writer for ever.

    Args:
        path: the file, or a symbolic link to it.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is something else, such as a folder or a FIFO.
    """  # noqa: DOC503
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a special file")
        raise ValueError(f"{os.fspath(path)} must be a regular file. Received: {kind}.")


def read_bytes(path: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: the file.
        max_bytes: the size from which it is refused, where no sound file is larger; None for any.

    Returns:
        All its bytes.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is not a regular file, is too large, or does not fit into memory.
    """  # noqa: DOC503
    require_regular(path)
    with open(path, "rb") as file, naming(path):
        try:
            content = file.read() if max_bytes is None else file.read(max_bytes + 1)
        except MemoryError as error:
            size = os.fstat(file.fileno()).st_size
            raise ValueError(
                f"{os.fspath(path)} does not fit into this machine's memory: {size:,} bytes."
            ) from error
    if max_bytes is not None and len(content) > max_bytes:
        raise ValueError(f"{os.fspath(path)} must have at most {max_bytes:,} bytes; it has more.")
    return content


def parse_json(content: str | bytes, where: str | Path) -> Any:
    """Returns the value of a JSON text from a file.

    Args:
        content: the text; bytes are UTF-8.
        where: the file, or the file and line, for the error.

    Returns:
        The value.

    Raises:
        ValueError: it is not JSON, or JSON that Python does not read: nested too deeply, or with a
            number of thousands of digits.
    """
    try:
        return json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}).") from error
