"""System errors that name the file they are about."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the name of a file to the system errors of work on it.

    Python names the file where `open` fails, but not where a later read, write or sync does: a full
    disk is a bare "[Errno 28] No space left on device".

    Args:
        path: the file that the body works on, as the user knows it.

    Yields:
        Nothing.

    Raises:
        OSError: what the body raised, of the same class, with the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # Given an error number, `OSError` creates the subclass, such as PermissionError.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
