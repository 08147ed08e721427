"""Tensor parallelism: weight matrices are split, every device sees the whole batch."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmos_tf import devices as device_list
from llmos_tf.mesh import Mesh
from llmos_tf.strategies.mesh import MeshStrategy


class TensorParallelStrategy(MeshStrategy):
    """Splits heads, feed-forward columns and vocabulary over devices (arXiv 1909.08053).

    Args:
        devices: device names; None takes all visible ones.
        layout_map: `keras.distribution.LayoutMap` or mapping from variable path to axes; None takes
            the model's own table.
        sequence_parallel: also split activations between blocks along positions.
        **options: others of `MeshStrategy`, such as `rematerialise`.

    Example:
        >>> strategy = TensorParallelStrategy()
        >>> with strategy.scope():
        ...     model = llmos_tf.models.GPT.from_preset("gpt_tiny")
    """

    def __init__(
        self,
        devices: Sequence[str] | None = None,
        layout_map: Mapping | None = None,
        sequence_parallel: bool = False,
        **options: Any,
    ):
        names = device_list.visible_devices() if devices is None else tuple(devices)
        super().__init__(
            Mesh(tensor=len(names), devices=names),
            layout_map=layout_map,
            sequence_parallel=sequence_parallel and len(names) > 1,
            **options,
        )
