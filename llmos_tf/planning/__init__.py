"""What a run will take, known before it starts. No TensorFlow."""

import importlib
from typing import Any

from llmos_tf.planning.bubbles import Bubble, published_bubble
from llmos_tf.planning.memory_model import memory_of
from llmos_tf.planning.plan import Plan
from llmos_tf.planning.simulation import Timeline, simulate
from llmos_tf.planning.traffic import step_traffic, wire_bytes
from llmos_tf.planning.training_step import TrainingStep

# Of `llmos_tf.planning.drawing`, which is imported when one is asked for: Matplotlib takes most of
# a second, and whoever trains needs the memory model alone.
_DRAWING = ("draw_png", "draw_text", "text_legend")

__all__ = [
    "Bubble",
    "Plan",
    "Timeline",
    "TrainingStep",
    "memory_of",
    "published_bubble",
    "simulate",
    "step_traffic",
    "wire_bytes",
    *_DRAWING,
]


def __getattr__(name: str) -> Any:
    if name not in _DRAWING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.drawing"), name)
