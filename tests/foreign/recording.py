"""Records the results of training calls, and compares two recordings.

A recording is a list with one entry per outermost call, in order: the method, its result (or the
type of the exception it raised) and the weights of the model after it.
"""

import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")

# Float32 has 24 bits, a relative rounding error of 6e-8. A strategy sums the rows of a batch, and
# the gradients, in another order than one device; over the sums of a few steps that error grows to
# about 1e-6. A wrong denominator or a lost row changes a result by far more than 1e-5.
RELATIVE = 1e-5
# The same, for results that are computed in 16 bits: 8 times their rounding error.
RELATIVE_OF_16_BITS = {"float16": 4e-3, "bfloat16": 3e-2}
# Sums that cancel to zero leave the rounding error of their terms, which are of the size of 1.
ABSOLUTE = 1e-6


class Recorder:
    """Wraps the training methods of a class, and records their calls.

    Args:
        trainer: the class that defines the methods.

    Attributes:
        calls: the recording of the current test.
    """

    def __init__(self, trainer: type):
        self.calls: list[dict[str, Any]] = []
        self._trainer = trainer
        self._originals = {name: getattr(trainer, name) for name in METHODS}
        self._depth = 0

    def install(self) -> None:
        for name, original in self._originals.items():
            setattr(self._trainer, name, self._recording(name, original))

    def remove(self) -> None:
        for name, original in self._originals.items():
            setattr(self._trainer, name, original)

    def begin_test(self) -> None:
        self.calls = []
        self._depth = 0

    def _recording(self, name: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def method(model, *args, **kwargs):
            self._depth += 1
            call = {"method": name, "raised": None, "result": None, "weights": None}
            try:
                result = original(model, *args, **kwargs)
                # `fit` calls `evaluate`: the outer call has its results.
                if self._depth == 1:
                    call["result"] = _leaves(getattr(result, "history", result))
            except Exception as error:
                call["raised"] = type(error).__name__
                raise
            finally:
                self._depth -= 1
                if self._depth == 0:
                    call["weights"] = _leaves(list(getattr(model, "weights", ())))
                    self.calls.append(call)
            return result

        return method


def _leaves(values: Any) -> list[Any]:
    """Arrays of nested tensors, variables and numbers; the components of ragged and sparse ones."""
    if isinstance(values, dict):
        # A metric that is missing is found by its name.
        return [leaf for name in sorted(values) for leaf in (name, *_leaves(values[name]))]
    return [_array(leaf) for leaf in tf.nest.flatten(values, expand_composites=True)]


def _array(leaf: Any) -> Any:
    if leaf is None or isinstance(leaf, str):
        return leaf
    try:
        if isinstance(leaf, keras.Variable) or tf.is_tensor(leaf):
            leaf = keras.ops.convert_to_numpy(leaf)
        array = np.asarray(leaf)
    except Exception as error:
        # Compared with the value of one device, it is a difference.
        return f"unreadable: {type(error).__name__}: {error}"
    # Types that only TensorFlow's numpy knows keep their name: it decides about the tolerance.
    return array if array.dtype != object else repr(leaf)


def differences(expected: Sequence[dict], received: Sequence[dict]) -> list[str]:
    """Returns a line for each call whose results differ.

    Args:
        expected: the recording of one device.
        received: that of a strategy.

    Returns:
        Lines such as "call 2 (fit): weights[0] differs by 3.0e-02 of at most 1.0e+00".
    """
    lines = []
    if len(expected) != len(received):
        lines.append(f"{len(received)} calls instead of {len(expected)}")
    for number, (old, new) in enumerate(zip(expected, received, strict=False), start=1):
        where = f"call {number} ({old['method']})"
        for key in ("method", "raised"):
            if old[key] != new[key]:
                lines.append(f"{where}: {key} is {new[key]} instead of {old[key]}")
        # A call that is refused may have built the model before, or not yet.
        refused = old["raised"] is not None and not old["weights"]
        for key in ("result",) if refused else ("result", "weights"):
            lines += [f"{where}: {key}{line}" for line in _compare(old[key], new[key])]
    return lines


def _compare(expected: list | None, received: list | None) -> list[str]:
    expected, received = expected or [], received or []
    if len(expected) != len(received):
        return [f" has {len(received)} values instead of {len(expected)}"]
    pairs = enumerate(zip(expected, received, strict=True))
    return [f"[{i}] {line}" for i, (old, new) in pairs if (line := _difference(old, new))]


def _difference(old: Any, new: Any) -> str | None:
    if not (isinstance(old, np.ndarray) and isinstance(new, np.ndarray)):
        same_kind = type(old) is type(new)
        return None if same_kind and old == new else f"is {new!r:.300} instead of {old!r:.300}"
    if old.shape != new.shape:
        return f"has the shape {new.shape} instead of {old.shape}"
    if old.dtype.kind in "biuSUO":
        same = np.array_equal(old, new)
        return None if same else f"is {new!r:.200} instead of {old!r:.200}"
    relative = RELATIVE_OF_16_BITS.get(old.dtype.name, RELATIVE)
    old, new = (
        np.asarray(x, np.complex128 if x.dtype.kind == "c" else np.float64) for x in (old, new)
    )
    # Infinities and NaNs have to be at the same places.
    finite = np.isfinite(old)
    if not np.array_equal(finite, np.isfinite(new)):
        return "has NaN or infinite elements at other places"
    if not np.array_equal(old[~finite], new[~finite], equal_nan=True):
        return "has other infinite elements"
    if not finite.any():
        return None
    # Of the largest element: the rounding errors of a sum are those of its largest terms.
    largest = np.abs(old[finite]).max()
    distance = np.abs(old[finite] - new[finite]).max()
    if distance <= ABSOLUTE + relative * largest:
        return None
    return f"differs by {distance:.1e}, the largest element is {largest:.1e}"


def save(path: Path, calls: Sequence[dict]) -> None:
    """Writes a recording."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(list(calls)))


def load(path: Path) -> list[dict]:
    """Reads a recording."""
    return pickle.loads(path.read_bytes())
