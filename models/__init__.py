"""Language models as plain Keras models that know nothing of devices, and their presets.

Configurations and presets need no TensorFlow; a model class imports it when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "llmos_tf.models":
    raise ImportError(
        "The folder models/ is the package llmos_tf.models: write `import llmos_tf.models`. "
        f"Received an import as {__name__!r}."
    )

from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig, ModelConfig
from llmos_tf.models.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from llmos_tf.models.gpt import GPT
    from llmos_tf.models.llama import Llama
    from llmos_tf.models.mixtral import Mixtral

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "Llama",
    "LlamaConfig",
    "Mixtral",
    "MixtralConfig",
    "ModelConfig",
    "get_preset",
]

# Names that need TensorFlow, and the module that defines each.
_LAZY = {
    "GPT": "llmos_tf.models.gpt",
    "Llama": "llmos_tf.models.llama",
    "Mixtral": "llmos_tf.models.mixtral",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
