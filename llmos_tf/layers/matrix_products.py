"""Products of matrices with gradients that are as fast as they are.

TensorFlow's gradient of a product is two products with one side transposed. On CPUs oneDNN takes up
to half as long again for some of these; the same numbers come faster in another way.
"""

from typing import Any

import tensorflow as tf


@tf.custom_gradient
def product(x_MK: tf.Tensor, kernel_KN: tf.Tensor) -> Any:
    """X A.

    Args:
        x_MK: X.
        kernel_KN: A.

    Returns:
        ``[M, N]``.
    """

    def gradient(upstream_MN):
        if x_MK.dtype in (tf.float32, tf.float64):
            # Another path than a product with a transposed side; some half precisions have no op.
            dx_MK = tf.einsum("mn,kn->mk", upstream_MN, kernel_KN)
        else:
            dx_MK = tf.matmul(upstream_MN, kernel_KN, transpose_b=True)
        return dx_MK, tf.matmul(x_MK, upstream_MN, transpose_a=True)

    return tf.matmul(x_MK, kernel_KN), gradient


@tf.custom_gradient
def product_by_rows(x_MK: tf.Tensor, table_NK: tf.Tensor) -> Any:
    """X Eᵀ, such as the scores of a vocabulary by the rows of its embedding.

    Args:
        x_MK: X.
        table_NK: E.

    Returns:
        ``[M, N]``.
    """

    def gradient(upstream_MN):
        # Xᵀ upstream, whose transposed side is the small one, and what comes is small too.
        dtable_KN = tf.matmul(x_MK, upstream_MN, transpose_a=True)
        return tf.matmul(upstream_MN, table_NK), tf.transpose(dtable_KN)

    return tf.matmul(x_MK, table_NK, transpose_b=True), gradient
