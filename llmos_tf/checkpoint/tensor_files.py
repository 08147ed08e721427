"""Safetensors files that are written and read one tensor at a time.

The format is a little-endian 64-bit length, a JSON header with dtype, shape and place of each
tensor, and their bytes end to end (https://github.com/huggingface/safetensors). The package
`safetensors` writes what is in memory all at once; shapes and dtypes are known before any value,
so here the header comes first and each value is fetched when its turn has come.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np
import tensorflow as tf
from safetensors import SafetensorError, safe_open

from llmos_tf.checkpoint.records import TensorRecord

# Keras dtype -> name in the format.
_CODES = {
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
_ALIGNMENT = 8


def check_dtypes(variables: Mapping[str, keras.Variable]) -> None:
    """Checks that variables can be stored.

    Args:
        variables: name to variable.

    Raises:
        ValueError: a dtype that files do not take.
    """
    for name, variable in variables.items():
        if variable.dtype not in _CODES:
            raise ValueError(
                f"A checkpoint stores the dtypes {', '.join(_CODES)}. Received: the variable "
                f"{name} of dtype {variable.dtype}."
            )


def write_tensors(path: Path, variables: Mapping[str, keras.Variable]) -> list[TensorRecord]:
    """Writes the full values of variables, and waits until they are on disk.

    Args:
        path: the file.
        variables: name to variable; each value is gathered on the host when it is written.

    Returns:
        What was written, in the order of `variables`.

    Raises:
        ValueError: a dtype that files do not take.
    """  # noqa: DOC502
    check_dtypes(variables)
    # Wide elements first: then each tensor lies at a multiple of its element's size.
    order = sorted(variables, key=lambda name: -_itemsize(variables[name].dtype))
    records = {}
    with path.open("wb") as file:
        file.write(_header([(name, variables[name]) for name in order]))
        for name in order:
            records[name] = _write_tensor(file, name, variables[name])
        file.flush()
        os.fsync(file.fileno())
    return [records[name] for name in variables]


def read_tensors(path: Path, records: Sequence[TensorRecord]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads tensors one at a time, and checks that they are those that were written.

    Args:
        path: the file.
        records: what `write_tensors` returned.

    Yields:
        Names and values, in the order of `records`.

    Raises:
        ValueError: the file is missing, cut off, changed, or another one.
    """
    try:
        with safe_open(path, framework="np") as file:
            if set(file.keys()) != {record.name for record in records}:
                raise ValueError(_damage(path, "it holds other variables than state.json lists"))
            for record in records:
                yield record.name, _checked(path, record, file.get_tensor(record.name))
    except FileNotFoundError:
        raise ValueError(_damage(path, "it is missing")) from None
    except SafetensorError as error:
        raise ValueError(_damage(path, str(error))) from error


def _write_tensor(file: BinaryIO, name: str, variable: keras.Variable) -> TensorRecord:
    # A function of its own, so that the value is gone before the next one is fetched.
    content = _bytes_of(variable.numpy())
    file.write(content)
    shape = tuple(int(length) for length in variable.shape)
    return TensorRecord(name, shape, variable.dtype, zlib.crc32(content))


def _checked(path: Path, record: TensorRecord, value: np.ndarray) -> np.ndarray:
    if (value.shape, value.dtype.name) != (record.shape, record.dtype):
        found = f"{value.dtype.name} {list(value.shape)}"
        raise ValueError(_damage(path, f"{record.name} is {found} in it"))
    if zlib.crc32(_bytes_of(value)) != record.crc32:
        raise ValueError(_damage(path, f"the bytes of {record.name} have changed"))
    return value


def _bytes_of(value: np.ndarray) -> memoryview:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _damage(path: Path, what: str) -> str:
    return (
        f"The file {path} is not what the checkpoint's state.json says: {what}. Copy the "
        "checkpoint again, or take another one."
    )


def _itemsize(dtype: str) -> int:
    return tf.as_dtype(dtype).size


def _header(variables: Sequence[tuple[str, keras.Variable]]) -> bytes:
    entries: dict[str, Any] = {}
    begin = 0
    for name, variable in variables:
        shape = [int(length) for length in variable.shape]
        end = begin + math.prod(shape) * _itemsize(variable.dtype)
        entries[name] = {
            "dtype": _CODES[variable.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
