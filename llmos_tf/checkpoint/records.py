"""Records of stored tensors. No TensorFlow."""

from typing import NamedTuple


class TensorRecord(NamedTuple):
    """What is known of a stored tensor.

    Attributes:
        name: its key in the file.
        shape: full shape.
        dtype: Keras's name of it.
        crc32: of its bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    crc32: int
