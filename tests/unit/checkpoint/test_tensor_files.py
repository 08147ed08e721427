"""Safetensors files: every dtype to the bit, one tensor in memory at a time, damage seen."""

import json
import math
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from llmos_tf.checkpoint.tensor_files import check_dtypes, read_tensors, write_tensors

pytestmark = pytest.mark.fast

FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")


def sample(dtype):
    """Values that a detour over another dtype would change."""
    kind = tf.as_dtype(dtype).as_numpy_dtype
    if dtype == "bool":
        return np.array([[True, False, True]])
    if dtype in INTEGERS:
        return np.array([np.iinfo(dtype).min, 0, np.iinfo(dtype).max], dtype)
    values = np.array([1 / 3, -0.0, math.inf, -math.inf, math.nan, 65504.0], kind)
    return np.concatenate([values, np.nextafter(kind(1), kind(2), dtype=kind)[None]])


def variable_of(value):
    return keras.Variable(value, dtype=value.dtype.name, trainable=False)


def bits(value):
    return value.shape, value.dtype.name, value.tobytes()


@pytest.fixture
def written(tmp_path):
    """A file of two variables, and what it holds."""
    variables = {"a": variable_of(np.arange(6.0)), "b": variable_of(np.arange(3, dtype="int32"))}
    path = tmp_path / "file.safetensors"
    return path, write_tensors(path, variables)


def test_all_dtypes_and_shapes_come_back_to_the_bit(tmp_path):
    """Fails if a dtype takes a detour, or scalars and empty tensors change their shape."""
    values = {dtype: sample(dtype) for dtype in (*FLOATS, *INTEGERS, "bool")}
    values |= {"scalar": np.array(3, "int64"), "empty": np.zeros([0, 2], "float32")}
    variables = {name: variable_of(value) for name, value in values.items()}
    path = tmp_path / "file.safetensors"
    records = write_tensors(path, variables)
    assert [record.name for record in records] == list(values)
    found = dict(read_tensors(path, records))
    assert {k: bits(v) for k, v in found.items()} == {k: bits(v) for k, v in values.items()}
    # The variables took the values as they are, too.
    assert {k: bits(v.numpy()) for k, v in variables.items()} == {
        k: bits(v) for k, v in found.items()
    }


def test_the_format_is_that_of_the_package(tmp_path):
    """Fails if other readers of safetensors would refuse the file, or see other tensors; or if a
    tensor does not lie at a multiple of its element's size."""
    values = {"byte": np.array([7], "uint8"), "half": np.ones(3, "float16"), "wide": np.ones(2)}
    path = tmp_path / "ours.safetensors"
    records = write_tensors(path, {name: variable_of(value) for name, value in values.items()})
    loaded = load_file(path)
    assert {k: bits(v) for k, v in loaded.items()} == {k: bits(v) for k, v in values.items()}
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % values[name].itemsize == 0
    theirs = tmp_path / "theirs.safetensors"
    save_file(values, theirs)
    assert {k: bits(v) for k, v in read_tensors(theirs, records)} == {
        k: bits(v) for k, v in values.items()
    }


def test_one_value_is_in_memory_at_a_time(tmp_path):
    """Fails if values are collected before they are written: the host would need all of them."""
    alive = []

    class Observed:
        dtype, shape = "float32", (4,)

        def numpy(self):
            assert [reference for reference in alive if reference() is not None] == []
            value = np.ones(4, "float32")
            alive.append(weakref.ref(value))
            return value

    write_tensors(tmp_path / "file.safetensors", {name: Observed() for name in "abc"})
    assert len(alive) == 3


def test_a_dtype_that_files_do_not_take():
    """Fails if a dtype is stored as something else, or refused without its variable's name."""
    variable = keras.Variable(np.ones(2, "complex64"), dtype="complex64", trainable=False)
    with pytest.raises(ValueError, match=r"the variable phase of dtype complex64"):
        check_dtypes({"phase": variable})


DAMAGES = {
    "cut off": lambda content: content[:-1],
    "cut off in the header": lambda content: content[:20],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"x",
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1",
    "a bit flipped": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(written, damage):
    """Fails if bytes that were never written reach a model."""
    path, records = written
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=r"file\.safetensors is not what the checkpoint"):
        list(read_tensors(path, records))


def test_another_file_is_seen(written, tmp_path):
    """Fails if a file that is sound by itself is taken for the one that was written."""
    path, records = written
    with safe_open(path, framework="np") as file:
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for change, expected in (
        ({"a": values["a"].reshape(2, 3)}, r"a is float64 \[2, 3\]"),
        ({"a": values["a"].view("int64")}, r"a is int64 \[6\]"),
        ({"c": values["a"]}, "other variables"),
    ):
        save_file(values | change, path)
        with pytest.raises(ValueError, match=expected):
            list(read_tensors(path, records))
    path.unlink()
    with pytest.raises(ValueError, match="it is missing"):
        list(read_tensors(path, records))
