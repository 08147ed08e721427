"""Generation: a trained model goes on with a prompt, on the mesh where it lives.

`SamplingConfig` needs no TensorFlow; the other names import it when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmos_tf.inference.sampling_config import SamplingConfig

if TYPE_CHECKING:
    from llmos_tf.inference.generation import generate
    from llmos_tf.inference.sampling import sample

__all__ = ["SamplingConfig", "generate", "sample"]

# Names that need TensorFlow, and the module that defines each.
_LAZY = {
    "generate": "llmos_tf.inference.generation",
    "sample": "llmos_tf.inference.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
