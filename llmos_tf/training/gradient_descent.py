"""Plain gradient descent, the first update rule."""

from typing import Any

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="llmos_tf")
class GradientDescent(keras.optimizers.Optimizer):
    """θ ← θ - η ∇J(θ), with no state beside the step count.

    Args:
        learning_rate: η; a number, or a `keras.optimizers.schedules.LearningRateSchedule`.
        name: of the optimizer.
        **kwargs: as for `keras.optimizers.Optimizer`: clipping, weight decay, averages.

    Example:
        >>> step = make_train_step(model, GradientDescent(0.1), keras.losses.MeanSquaredError())
    """

    # An element's update needs that element's gradient only, so a rank may update its part alone.
    elementwise = True

    def __init__(self, learning_rate: Any = 0.01, name: str = "gradient_descent", **kwargs: Any):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: Any) -> None:
        """Updates one variable.

        Args:
            gradient: ∇J for it.
            variable: θ.
            learning_rate: η.
        """
        self.assign_sub(variable, gradient * tf.cast(learning_rate, variable.dtype))
