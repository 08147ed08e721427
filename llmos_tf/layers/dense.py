"""Matrix products whose weights may be cut over the `tensor` axis."""

import math
from typing import Any

import keras
import tensorflow as tf

from llmos_tf.layers.matrix_products import product
from llmos_tf.sharding import local_slice


class Dense(keras.layers.Layer):
    """Y = XA + b, over any number of input and output dimensions.

    Computes with the slice of A that this rank holds and communicates nothing: the layer around
    it enters and leaves the region (`layers.tensor_region.TensorRegion`). With A = [A_1 .. A_t] cut
    by columns each rank gets Y_i = X A_i; with A cut by rows, X_i A_i is a partial sum of Y, and
    the bias is added by the caller after the sum (`add_bias`).

    Args:
        input_shape: trailing dimensions of the input that are contracted, such as ``(D,)`` or
            ``(N, H)``.
        output_shape: dimensions of the output in their place.
        use_bias: whether to make b.
        initializer: of A.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[..., *input_shape]``, or this rank's slice of it.

    Call returns:
        ``[..., *output_shape]`` without the bias, or this rank's slice or partial sum of it.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        use_bias: bool = True,
        initializer: Any = "glorot_uniform",
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.contracted = tuple(input_shape)
        self.produced = tuple(output_shape)
        self.use_bias = use_bias
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape: Any = None) -> None:
        """Makes the kernel, of shape ``input_shape + output_shape``, and the bias.

        Args:
            input_shape: not needed.
        """
        self.kernel = self.add_weight(
            name="kernel",
            shape=self.contracted + self.produced,
            initializer=_MatrixInitializer(
                self.initializer, math.prod(self.contracted), math.prod(self.produced)
            ),
        )
        self.bias = (
            self.add_weight(name="bias", shape=self.produced, initializer="zeros")
            if self.use_bias
            else None
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        kernel = local_slice(self.kernel)
        num_in = len(self.contracted)
        in_size = math.prod(kernel.shape[:num_in])
        produced = kernel.shape[num_in:]
        # One product of two matrices: with more dimensions TensorFlow would broadcast the kernel.
        y = product(
            tf.reshape(x, [-1, in_size]), tf.reshape(kernel, [in_size, math.prod(produced)])
        )
        leading = x.shape[: x.shape.rank - num_in]
        dynamic = tf.shape(x)
        sizes = [dynamic[i] if size is None else size for i, size in enumerate(leading)]
        return tf.reshape(y, [*sizes, *produced])

    def add_bias(self, y: tf.Tensor) -> tf.Tensor:
        """Adds this rank's slice of the bias.

        Args:
            y: output of the layer, complete.

        Returns:
            y + b, or y without a bias.
        """
        if self.bias is None:
            return y
        bias = local_slice(self.bias)
        # The gradient of this op is several times faster than that of y + b; and to a matrix it is
        # added by the product itself.
        matrix = tf.reshape(y, [-1, bias.shape.num_elements()])
        return tf.reshape(tf.nn.bias_add(matrix, tf.reshape(bias, [-1])), tf.shape(y))

    def compute_output_shape(self, input_shape: Any) -> tuple:
        """Returns the shape of the output.

        Args:
            input_shape: of the input.

        Returns:
            The leading dimensions and `output_shape`.
        """
        return (*input_shape[: len(input_shape) - len(self.contracted)], *self.produced)


class _MatrixInitializer(keras.initializers.Initializer):
    """Initializes a kernel of many dimensions as the matrix that it is."""

    def __init__(self, inner: Any, rows: int, columns: int):
        self._inner = inner
        self._matrix = (rows, columns)

    def __call__(self, shape, dtype=None):
        return tf.reshape(self._inner(self._matrix, dtype=dtype), shape)
