"""Data parallelism: the batch is split, weights are everywhere."""

from collections.abc import Sequence
from typing import Any

from llmos_tf import devices as device_list
from llmos_tf.mesh import Mesh
from llmos_tf.strategies.mesh import MeshStrategy


class DataParallelStrategy(MeshStrategy):
    """Splits the batch over devices, sums gradients, updates the same weights everywhere.

    Args:
        devices: device names; None takes all visible ones.
        **options: others of `MeshStrategy`, such as `rematerialise`.

    Example:
        >>> strategy = DataParallelStrategy()
        >>> with strategy.scope():
        ...     model = keras.Sequential([...])
        ...     model.compile("adam", "mse")
        >>> model.fit(x, y)
    """

    def __init__(self, devices: Sequence[str] | None = None, **options: Any):
        names = device_list.visible_devices() if devices is None else tuple(devices)
        super().__init__(Mesh(data=len(names), devices=names), **options)
