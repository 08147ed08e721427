"""What a run will take, known before it starts. No TensorFlow."""

from llmos_tf.planning.bubbles import Bubble, published_bubble
from llmos_tf.planning.drawing import draw_png, draw_text, text_legend
from llmos_tf.planning.simulation import Timeline, simulate

__all__ = [
    "Bubble",
    "Timeline",
    "draw_png",
    "draw_text",
    "published_bubble",
    "simulate",
    "text_legend",
]
