"""ZeRO: data parallelism whose state is cut over the devices."""

from collections.abc import Sequence
from typing import Any

from llmos_tf import devices as device_list
from llmos_tf.mesh import Mesh
from llmos_tf.strategies.mesh import MeshStrategy


class ZeroStrategy(MeshStrategy):
    """Data parallelism without redundant state (ZeRO, arXiv 1910.02054).

    With P parameters, N devices, float32 weights and Adam, bytes a device of weights and optimizer
    state: 12P without it, (4 + 8/N)P for stages 1 and 2, 12P/N for stage 3.

    Args:
        stage: 1 cuts optimizer state, 2 accumulated gradients too, 3 parameters too.
        devices: device names; None takes all visible ones.
        **options: others of `MeshStrategy`, such as `rematerialise`.

    Raises:
        ValueError: another stage.

    Example:
        >>> strategy = ZeroStrategy(stage=3)
        >>> with strategy.scope():
        ...     model = keras.Sequential([...])
    """

    def __init__(self, stage: int, devices: Sequence[str] | None = None, **options: Any):
        if stage not in (1, 2, 3):
            raise ValueError(
                f"ZeroStrategy has stages 1, 2 and 3; stage 0 is DataParallelStrategy. "
                f"Received: stage={stage!r}."
            )
        names = device_list.visible_devices() if devices is None else tuple(devices)
        axis = "fsdp" if stage == 3 else "data"
        super().__init__(Mesh(**{axis: len(names)}, devices=names), zero_stage=stage, **options)
