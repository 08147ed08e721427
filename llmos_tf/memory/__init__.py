"""What lies on each device, counted and not guessed, and how to have less of it there."""

from llmos_tf.memory.accounting import report
from llmos_tf.memory.estimating import estimate
from llmos_tf.memory.rematerialisation import rematerialised
from llmos_tf.resident import peak_resident_bytes

__all__ = ["estimate", "peak_resident_bytes", "rematerialised", "report"]
