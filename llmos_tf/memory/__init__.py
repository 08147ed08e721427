"""What lies on each device: bytes of parameters and of optimizer state, counted and not guessed."""

from llmos_tf.memory.accounting import report

__all__ = ["report"]
