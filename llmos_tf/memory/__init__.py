"""What lies on each device, counted and not guessed, and how to have less of it there."""

from llmos_tf.memory.accounting import report
from llmos_tf.memory.estimation import estimate
from llmos_tf.process import peak_resident_bytes
from llmos_tf.rematerialisation.rematerialise import rematerialised

__all__ = ["estimate", "peak_resident_bytes", "rematerialised", "report"]
