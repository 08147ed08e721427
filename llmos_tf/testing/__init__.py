"""What tests of parallel training need: train the same model on one device and on a mesh."""

from llmos_tf.testing.parity import TrainedWeights, max_difference, train
from llmos_tf.testing.precision import TOLERANCES
from llmos_tf.testing.report import Report, Row
from llmos_tf.testing.verification import Verification, verify

__all__ = [
    "TOLERANCES",
    "Report",
    "Row",
    "TrainedWeights",
    "Verification",
    "max_difference",
    "train",
    "verify",
]
