"""The scope of a strategy around a test, kept when the test clears Keras's session."""

import contextlib
import re

import tensorflow as tf

from llmos_tf.devices import visible_devices
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import DataParallelStrategy, MeshStrategy, ZeroStrategy

# Of "zero3", which names no devices, and of runs without a strategy, which have the same ones.
DEVICES = 2


def devices_of(spec: str) -> int:
    """Returns the number of devices that a strategy needs.

    Args:
        spec: as for `make_strategy`.
    """
    if spec in ("none", "mirrored") or _zero_stage(spec):
        return DEVICES
    return max(DEVICES, Mesh.from_string(spec).size)


def make_strategy(spec: str) -> tf.distribute.Strategy | None:
    """Creates a strategy.

    Args:
        spec: "none", "zero1" to "zero3" (over two devices), a mesh such as "data=2,fsdp=2", or
            "mirrored": TensorFlow's own MirroredStrategy over two devices, to see whether a failure
            is one of `tf.distribute`.

    Returns:
        A new strategy; None for "none".
    """
    if spec == "none":
        return None
    if spec == "mirrored":
        return tf.distribute.MirroredStrategy(visible_devices()[:DEVICES])
    if stage := _zero_stage(spec):
        return ZeroStrategy(stage, devices=visible_devices()[:DEVICES])
    mesh = Mesh.from_string(spec)
    names = visible_devices()[: mesh.size]
    if mesh.size == mesh.axis_size("data"):
        return DataParallelStrategy(names)
    return MeshStrategy(mesh, devices=names)


def _zero_stage(spec: str) -> int | None:
    found = re.fullmatch("zero([123])", spec)
    return int(found[1]) if found else None


class TestScope:
    """A context manager: the scope of a new strategy.

    `keras.utils.clear_session` resets TensorFlow's default graph, which holds the scope. Inside
    this context the scope is left before the reset, and entered again after it.

    Args:
        spec: as for `make_strategy`.
    """

    # Not a test, whatever its name.
    __test__ = False

    def __init__(self, spec: str):
        self._strategy = make_strategy(spec)
        self._scope = None
        self._reset = tf.compat.v1.reset_default_graph

    def __enter__(self) -> "TestScope":
        if self._strategy is not None:
            tf.compat.v1.reset_default_graph = self._reset_inside
            self._open()
        return self

    def __exit__(self, *error) -> None:
        if self._strategy is not None:
            tf.compat.v1.reset_default_graph = self._reset
            self._close()

    def _open(self) -> None:
        self._scope = self._strategy.scope()
        self._scope.__enter__()

    def _close(self) -> None:
        # ValueError: a layout rule of the whole run that the test's variables do not use.
        # RuntimeError, IndexError: the test resets the graph inside of a scope of its own, or left
        # one open. The reset forgets all scopes anyway.
        with contextlib.suppress(ValueError, RuntimeError, IndexError):
            self._scope.__exit__(None, None, None)

    def _reset_inside(self) -> None:
        self._close()
        self._reset()
        self._open()
