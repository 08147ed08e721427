"""What tests of parallel training need: train the same model on one device and on a mesh."""

from llmos_tf.testing.parity import TrainedWeights, max_difference, train

__all__ = ["TrainedWeights", "max_difference", "train"]
