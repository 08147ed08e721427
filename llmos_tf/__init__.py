"""llmos_tf: train large language models with TensorFlow and Keras over a mesh of devices.

`import llmos_tf` does not import TensorFlow: names are resolved when they are first used, so that
`llmos_tf.devices` can set up virtual CPU devices before TensorFlow starts its own, and a script
that only reads a configuration starts at once.

Example:
    >>> import llmos_tf
    >>> llmos_tf.Mesh(data=2, tensor=2).size
    4
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmos_tf.mesh import Mesh

if __name__ != "llmos_tf":
    # The repository's root is on __path__ below, so that llmos_tf.llmos_tf would be found: a second
    # copy of every class, unequal to the first.
    raise ImportError(f"This package is imported as llmos_tf. Received: {__name__}.")

__version__ = "0.1.0"

# Modules that are attributes of the package without an import of their own.
_MODULES = frozenset(
    {
        "checkpoint",
        "collectives",
        "config",
        "data",
        "devices",
        "inference",
        "layers",
        "memory",
        "mesh",
        "models",
        "planning",
        "sharding",
        "strategies",
        "testing",
        "training",
    }
)
# Other public names, and the module that defines each.
_NAMES = {"Mesh": "llmos_tf.mesh"}

__all__ = ["Mesh", "__version__", *sorted(_MODULES)]

# A checkout that is not installed has strategies/, models/ and scripts/ beside this folder and not
# in it (docs/adr/0002). In an installed package there is no setup.cfg, and nothing is added.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file() and (_root / "strategies").is_dir():
    __path__.append(str(_root))
del _root


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
