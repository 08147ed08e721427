"""Functions of Keras that are replaced while a program is traced, in the thread that traces it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from llmos_tf import _internal
from llmos_tf.spmd.program import current_program


@contextlib.contextmanager
def replaced_in_program(replacements: dict[tuple[Any, str], Callable]) -> Iterator[None]:
    """Replaces functions for the time of the context, in programs alone.

    Another thread may call them meanwhile, and gets the originals.

    Args:
        replacements: as `_internal.patched` takes them.
    """
    with _internal.patched({key: _in_program(make) for key, make in replacements.items()}):
        yield


def _in_program(make: Callable) -> Callable:
    def made(original):
        replacement = make(original)

        @functools.wraps(original)
        def either(*args, **kwargs):
            function = original if current_program() is None else replacement
            return function(*args, **kwargs)

        return either

    return made
