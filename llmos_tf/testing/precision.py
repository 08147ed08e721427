"""The dtypes that a verification can run in, and what each allows."""

import contextlib
from collections.abc import Iterator

import keras

# What a dtype allows by default. Sums in another order differ by 1e-16 in float64, which an
# adaptive optimizer magnifies to some 1e-14; a wrong factor, mask or axis is far above 1e-9. In the
# others the same magnification leaves less room, so they show coarse faults only.
TOLERANCES = {
    "float64": 1e-9,
    "float32": 1e-4,
    "mixed_bfloat16": 1e-2,
    "mixed_float16": 1e-2,
}


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Makes models in a dtype for the time of the context.

    Args:
        dtype: a key of `TOLERANCES`.
    """
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    try:
        keras.config.set_floatx("float64" if dtype == "float64" else "float32")
        keras.config.set_dtype_policy(dtype)
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
