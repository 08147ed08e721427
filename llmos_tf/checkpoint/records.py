"""Records of stored tensors, and their dtypes. No TensorFlow."""

from typing import NamedTuple

# Keras dtype -> name in a safetensors file.
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


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
