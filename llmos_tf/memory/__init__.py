"""What lies on each device, counted and not guessed, and how to have less of it there."""

from llmos_tf.memory.accounting import report
from llmos_tf.memory.estimating import estimate
from llmos_tf.memory.process import peak_resident_bytes
from llmos_tf.memory.rematerialisation import rematerialised

__all__ = ["estimate", "peak_resident_bytes", "rematerialised", "report"]
