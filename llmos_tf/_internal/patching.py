"""Attributes of other packages, replaced for the duration of a context."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

# An attribute is one for all threads of a process: two that replace it in turn would put back each
# other's replacement. A thread may replace more inside.
_REPLACING = threading.RLock()


@contextlib.contextmanager
def patched(replacements: dict[tuple[Any, str], Callable]) -> Iterator[None]:
    """Replaces attributes for the time of the context, in one thread at a time.

    Args:
        replacements: maps (object, attribute name) to a function of the original attribute that
            returns its replacement.
    """
    with _REPLACING:
        originals = {key: getattr(*key) for key in replacements}
        try:
            for (target, name), make in replacements.items():
                setattr(target, name, make(originals[target, name]))
            yield
        finally:
            for (target, name), original in originals.items():
                setattr(target, name, original)
