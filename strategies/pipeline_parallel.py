"""Pipeline parallelism: every device has a part of the model, and microbatches go through them."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmos_tf import devices as device_list
from llmos_tf.mesh import Mesh
from llmos_tf.strategies.mesh import MeshStrategy


class PipelineParallelStrategy(MeshStrategy):
    """Cuts a model between its layers into stages, one for each device.

    Args:
        devices: device names; None takes all visible ones.
        num_microbatches: into how many equal parts the batch is cut; None: as many as stages.
        schedule: "gpipe", "1f1b", "interleaved", "zb-h1" or "zb-v"; see `planning.schedules`.
        num_chunks: parts of the model on each stage, for the schedule "interleaved".
        stage_of: layer name to stage, to overrule how the model is cut.
        **options: others of `MeshStrategy`, such as `rematerialise`.

    Raises:
        ValueError: fewer than two devices, an unknown schedule, or numbers that it does not take.

    Example:
        >>> strategy = PipelineParallelStrategy(num_microbatches=8)
        >>> with strategy.scope():
        ...     model = keras.Sequential([...])
        ...     model.compile("adam", "mse")
        >>> model.fit(x, y, batch_size=32)
    """

    def __init__(
        self,
        devices: Sequence[str] | None = None,
        *,
        num_microbatches: int | None = None,
        schedule: str = "1f1b",
        num_chunks: int = 1,
        stage_of: Mapping[str, int] | None = None,
        **options: Any,
    ):
        names = device_list.visible_devices() if devices is None else tuple(devices)
        if len(names) < 2:
            raise ValueError(
                f"A pipeline has at least 2 stages, each on a device of its own. Received: "
                f"{len(names)} device(s): {', '.join(names) or 'none'}. On a CPU, "
                "llmos_tf.devices.configure_virtual_cpus(2) makes two."
            )
        super().__init__(
            Mesh(pipe=len(names), devices=names),
            num_microbatches=num_microbatches,
            schedule=schedule,
            num_chunks=num_chunks,
            stage_of=stage_of,
            **options,
        )
