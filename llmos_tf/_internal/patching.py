"""Attributes of other packages, replaced for the duration of a context."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def patched(replacements: dict[tuple[Any, str], Callable]) -> Iterator[None]:
    """Replaces attributes for the time of the context.

    Args:
        replacements: maps (object, attribute name) to a function of the original attribute that
            returns its replacement.
    """
    originals = {key: getattr(*key) for key in replacements}
    try:
        for (target, name), make in replacements.items():
            setattr(target, name, make(originals[target, name]))
        yield
    finally:
        for (target, name), original in originals.items():
            setattr(target, name, original)
