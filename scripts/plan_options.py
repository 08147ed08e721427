"""The options of llmos-plan, checked. No TensorFlow."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from llmos_tf.mesh import Mesh
from llmos_tf.models.presets import get_preset
from llmos_tf.options import MeshOptions
from llmos_tf.planning.plan import COMPUTE_BYTES, Plan
from llmos_tf.planning.schedules import SCHEDULES, Schedule, make_schedule
from llmos_tf.scripts.checks import check_counts, check_folder_of

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of llmos-plan. Fields have the names of the flags.

    Raises:
        ValueError: a value that no plan can have.
    """

    draw_schedule: str | None
    stages: int
    microbatches: int | None
    num_chunks: int
    png: str | None
    json: str | None
    preset: str
    mesh: str | None
    global_batch: int
    seq_len: int | None
    dtype: str
    device_memory: str | None
    zero_stage: int
    sequence_parallel: bool
    context_method: str
    schedule: str
    rematerialise: str
    offload: str | None
    reshard_after_forward: bool

    def __post_init__(self):
        if not self.draw_schedule and not self.mesh:
            raise ValueError(
                f"There is nothing to plan. Give --draw_schedule={SCHEDULES[1]}, or another one of "
                f"{', '.join(SCHEDULES)}, for its picture; or --mesh=data=8 and a --preset, for "
                "the memory that each device needs."
            )
        counts = ("stages", "num_chunks", "global_batch")
        optional = [name for name in ("microbatches", "seq_len") if getattr(self, name) is not None]
        check_counts(self, *counts, *optional)
        if self.dtype not in COMPUTE_BYTES:
            raise ValueError(
                f"--dtype must be one of {', '.join(COMPUTE_BYTES)}. Received: {self.dtype!r}."
            )
        _ = self.device_bytes
        for name in ("json", "png"):
            check_folder_of(name, getattr(self, name))

    @property
    def parsed_mesh(self) -> Mesh:
        """The mesh, without devices."""
        return Mesh.from_string(self.mesh)

    @property
    def device_bytes(self) -> int | None:
        """`--device_memory` in bytes.

        Raises:
            ValueError: it is no number of bytes.
        """
        if self.device_memory is None:
            return None
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?)B?", self.device_memory.upper())
        unit = (_UNITS | _BINARY_UNITS).get(match[2]) if match else None
        if unit is None or not float(match[1]):
            raise ValueError(
                "--device_memory must be a number with a unit, such as 80GB (10⁹ bytes) or 24GiB "
                f"(2³⁰ bytes). Received: {self.device_memory!r}."
            )
        return int(float(match[1]) * unit)

    def drawn_schedule(self) -> Schedule:
        """Returns the schedule to draw.

        Returns:
            The schedule, checked.

        Raises:
            ValueError: an unknown name, or numbers that it does not take.
        """  # noqa: DOC502
        return make_schedule(self.draw_schedule, self.stages, self.microbatches, self.num_chunks)

    def plan(self) -> Plan:
        """Returns the run whose memory is planned: a step of AdamW.

        Returns:
            The plan, checked.

        Raises:
            ValueError: options that do not fit the mesh or the model.
        """  # noqa: DOC502
        mesh, config = self.parsed_mesh, get_preset(self.preset)
        has_pipe = mesh.axis_size("pipe") > 1
        options = MeshOptions(
            zero_stage=self.zero_stage,
            sequence_parallel=self.sequence_parallel,
            context_method=self.context_method,
            schedule=self.schedule,
            num_microbatches=self.microbatches if has_pipe else None,
            num_chunks=self.num_chunks,
            offload=self.offload,
            reshard_after_forward=self.reshard_after_forward,
        ).resolved(mesh)
        if self.seq_len is not None and self.seq_len > config.max_positions:
            raise ValueError(
                f"--seq_len={self.seq_len} is more than the {config.max_positions} positions of "
                f"{self.preset}. Take at most {config.max_positions}."
            )
        return Plan(
            config=config,
            mesh=mesh,
            global_batch=self.global_batch,
            seq_len=self.seq_len or config.max_positions,
            zero_stage=options.zero_stage,
            sequence_parallel=options.sequence_parallel,
            context_method=options.context_method,
            schedule=options.make_schedule(mesh),
            decays=True,
            compute_bytes=COMPUTE_BYTES[self.dtype],
            rematerialise=self.rematerialise,
            offload=options.offload,
            reshard_after_forward=options.reshard_after_forward,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)
