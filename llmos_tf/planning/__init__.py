"""What a run will take, known before it starts. No TensorFlow."""

from llmos_tf.planning.bubbles import Bubble, published_bubble
from llmos_tf.planning.drawing import draw_png, draw_text, text_legend
from llmos_tf.planning.simulation import Timeline, simulate
from llmos_tf.planning.traffic import step_traffic, wire_bytes
from llmos_tf.planning.training_step import TrainingStep

__all__ = [
    "Bubble",
    "Timeline",
    "TrainingStep",
    "draw_png",
    "draw_text",
    "published_bubble",
    "simulate",
    "step_traffic",
    "text_legend",
    "wire_bytes",
]
