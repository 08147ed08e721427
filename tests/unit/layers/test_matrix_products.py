"""Products and their gradients against TensorFlow's."""

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.layers.matrix_products import product, product_by_rows

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize(
    ("mine", "theirs", "shape"),
    [
        (product, tf.matmul, (3, 4)),
        (product_by_rows, lambda x, table: tf.matmul(x, table, transpose_b=True), (4, 3)),
    ],
)
def test_values_and_gradients(mine, theirs, shape, dtype):
    """Fails if a gradient is transposed, or of the other side, or in no precision of its own."""
    rng = np.random.default_rng(0)
    x, weight, upstream = (
        tf.cast(rng.integers(-3, 4, size), dtype) for size in ((5, 3), shape, (5, 4))
    )
    found = []
    for function in (mine, theirs):
        with tf.GradientTape() as tape:
            tape.watch([x, weight])
            y = function(x, weight)
        found.append([y, *tape.gradient(y, [x, weight], upstream)])
    for one, other in zip(*found, strict=True):
        # Small whole numbers, of which both dtypes have exact sums.
        np.testing.assert_array_equal(one, other)
