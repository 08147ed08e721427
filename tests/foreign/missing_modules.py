"""Stand-ins for what tests of Keras import and is not installed."""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence

import keras
import pytest

# Files of tests for all backends import them at the top.
NAMES = ("grain", "jax", "pandas", "scipy", "torch")


class _StandIn(types.ModuleType):
    """A module without content: a test that uses it fails, and is left out of the comparison."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(f"{self.__name__}.{name}: {self.__name__} is not installed.")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]):
        self._names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def _keras_conftest() -> types.ModuleType:
    """The functions of Keras's conftest.py, which is not in the wheel, that its tests import."""
    module = types.ModuleType("conftest")

    def skip_if_backend(backend: str, reason: str) -> pytest.MarkDecorator:
        return pytest.mark.skipif(keras.backend.backend() == backend, reason=reason)

    module.skip_if_backend = skip_if_backend
    return module


@contextlib.contextmanager
def stand_ins(names: Sequence[str] = NAMES) -> Iterator[None]:
    """Imports of frameworks that are not installed find an empty module, in this context only.

    Args:
        names: of top-level modules.
    """
    missing = tuple(name for name in names if importlib.util.find_spec(name) is None)
    finder = _Finder(missing)
    sys.meta_path.append(finder)
    # Of Keras's repository; another one may be imported under this name.
    before = sys.modules.get("conftest")
    sys.modules["conftest"] = _keras_conftest()
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        del sys.modules["conftest"]
        if before is not None:
            sys.modules["conftest"] = before
        for name in [name for name in sys.modules if name.partition(".")[0] in missing]:
            del sys.modules[name]
