"""What the flags of a program said, as one checked object.

A value that no run can have is found here, before a device is made or a file is read.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmos_tf.mesh import Mesh
from llmos_tf.options import CONTEXT_METHODS, REMATERIALISE, MeshOptions
from llmos_tf.planning.schedules import SCHEDULES, Schedule, make_schedule


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the flags said, checked. Fields have the flags' names and meanings.

    Raises:
        ValueError: a value that no run can have.
    """

    preset: str
    mesh: str
    zero_stage: int
    sequence_parallel: bool
    microbatches: int | None
    schedule: str
    num_chunks: int
    context_method: str
    gradient_compression: str | None
    rematerialise: str
    offload: str | None
    reshard_after_forward: bool
    virtual_devices: int | None
    global_batch: int
    seq_len: int | None
    steps: int
    learning_rate: float
    data: str
    tokenizer: str | None
    workdir: str | None
    checkpoint: str | None
    resume: bool
    save_every: int
    seed: int
    json: str | None

    def __post_init__(self):
        check_counts(self, "global_batch", "steps", "save_every")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"--seq_len is at least 2. Received: {self.seq_len}.")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning_rate is above 0. Received: {self.learning_rate}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed is from 0 to {2**31 - 1}. Received: {self.seed}.")
        for name in ("data", "mesh"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is empty. See --help for what it takes.")
        check_folder_of("json", self.json)
        if self.resume and not self.workdir:
            raise ValueError("--resume goes on from a checkpoint in --workdir. Name the folder.")
        _check_axes(self, [self.parsed_mesh])
        if self.rematerialise not in REMATERIALISE and not self.rematerialise.isdecimal():
            raise ValueError(
                f"--rematerialise is one of {', '.join(REMATERIALISE)}, or a number of bytes. "
                f"Received: {self.rematerialise!r}."
            )
        MeshOptions(offload=self.offload).resolved(self.parsed_mesh)
        microbatches = self.microbatches or self.parsed_mesh.axis_size("pipe")
        ways, of = self.parsed_mesh.batch_ways * microbatches, "data × fsdp"
        if microbatches > 1:
            of += " × microbatches"
        if self.global_batch % ways:
            raise ValueError(
                f"--global_batch={self.global_batch} is split over {of} = {ways} parts with the "
                f"mesh {self.parsed_mesh}, and they do not divide it. Take a multiple of {ways}."
            )

    @property
    def parsed_mesh(self) -> Mesh:
        """The mesh, without devices."""
        return Mesh.from_string(self.mesh)

    @property
    def recomputation(self) -> str | int:
        """What `MeshStrategy` takes as `rematerialise`."""
        return int(self.rematerialise) if self.rematerialise.isdecimal() else self.rematerialise

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What the flags of llmos-verify said, checked. Fields have the flags' names and meanings.

    Raises:
        ValueError: a value that no verification can have.
    """

    model: str
    batches: str
    mesh: tuple[str, ...]
    zero_stage: int
    sequence_parallel: bool
    microbatches: int | None
    schedule: str
    num_chunks: int
    context_method: str
    layout_map: str | None
    steps: int
    dtype: str
    tolerance: float | None
    virtual_devices: int | None
    seed: int
    json: str | None

    def __post_init__(self):
        for name, what in (
            ("model", "makes a compiled model"),
            ("batches", "yields global batches"),
        ):
            if not getattr(self, name):
                raise ValueError(
                    f"--{name}=MODULE:FUNCTION is missing: the function that {what}. "
                    "See --help for an example."
                )
        check_counts(self, "steps")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed is from 0 to {2**31 - 1}. Received: {self.seed}.")
        if len(set(map(str, self.parsed_meshes))) < len(self.mesh):
            raise ValueError(
                f"A mesh is given twice. Received: --mesh={' --mesh='.join(self.mesh)}."
            )
        _check_axes(self, self.parsed_meshes)
        check_folder_of("json", self.json)

    @property
    def parsed_meshes(self) -> list[Mesh]:
        """The meshes, without devices."""
        return [Mesh.from_string(text) for text in self.mesh]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the flags of llmos-plan said, checked. Fields have the flags' names and meanings.

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
    zero_stage: int
    sequence_parallel: bool
    context_method: str
    rematerialise: str
    offload: str | None

    def __post_init__(self):
        if not self.draw_schedule and not self.mesh:
            raise ValueError(
                f"What is to be planned? Give --draw_schedule={SCHEDULES[1]}, or another one of "
                f"{', '.join(SCHEDULES)}, for its picture; or --mesh=data=8 and a --preset, for "
                "the memory that each device needs."
            )
        counts = ("stages", "num_chunks", "global_batch")
        check_counts(self, *counts, *(("microbatches",) if self.microbatches is not None else ()))
        if self.png and not self.png.endswith(".png"):
            raise ValueError(f"--png={self.png} is not the name of a .png file.")
        for name in ("json", "png"):
            check_folder_of(name, getattr(self, name))

    def schedule(self) -> Schedule:
        """Returns the schedule.

        Returns:
            The schedule, checked.

        Raises:
            ValueError: an unknown name, or numbers that it does not take.
        """  # noqa: DOC502
        return make_schedule(self.draw_schedule, self.stages, self.microbatches, self.num_chunks)

    def run_options(self, schedule: str) -> dict[str, Any]:
        """Returns what `llmos_tf.memory.estimate` takes beside a configuration and a mesh.

        Args:
            schedule: the name of the one on the pipe axis.

        Returns:
            Its keyword arguments.

        Raises:
            ValueError: options that do not fit the mesh.
        """  # noqa: DOC502
        mesh = Mesh.from_string(self.mesh)
        options = MeshOptions(
            zero_stage=self.zero_stage,
            sequence_parallel=self.sequence_parallel,
            context_method=self.context_method,
            schedule=schedule,
            num_microbatches=self.microbatches if mesh.axis_size("pipe") > 1 else None,
            num_chunks=self.num_chunks,
            offload=self.offload,
        ).resolved(mesh)
        return {
            "global_batch": self.global_batch,
            "seq_len": self.seq_len,
            "zero_stage": options.zero_stage,
            "sequence_parallel": options.sequence_parallel,
            "context_method": options.context_method,
            "schedule": options.schedule,
            "num_microbatches": options.num_microbatches,
            "num_chunks": options.num_chunks,
            "rematerialise": self.rematerialise,
            "offload": options.offload,
        }


def check_counts(options: Any, *names: str) -> None:
    """Checks that flags are positive.

    Args:
        options: has them as fields.
        *names: of the flags.

    Raises:
        ValueError: one that is less than 1.
    """
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is at least 1. Received: {getattr(options, name)}.")


def _check_axes(options: RunOptions | VerifyOptions, meshes: Sequence[Mesh]) -> None:
    """Finds a flag of an axis that no mesh has, or that the axis cannot have."""
    check_counts(options, "num_chunks")
    if options.microbatches is not None:
        check_counts(options, "microbatches")
    for name, known in (("schedule", SCHEDULES), ("context_method", CONTEXT_METHODS)):
        if getattr(options, name) not in known:
            raise ValueError(
                f"--{name} is one of {', '.join(known)}. Received: {getattr(options, name)!r}."
            )
    for name, default, axis in (
        ("microbatches", None, "pipe"),
        ("schedule", "1f1b", "pipe"),
        ("num_chunks", 1, "pipe"),
        ("context_method", "ring", "context"),
    ):
        given = getattr(options, name)
        if given != default and all(mesh.axis_size(axis) == 1 for mesh in meshes):
            raise ValueError(
                f"--{name}={given} is for the axis {axis}, which has size 1. Received: "
                f"--mesh={' --mesh='.join(map(str, meshes))}. Add {axis}=2 to it, or leave "
                f"--{name} out."
            )
    for mesh in meshes:
        if mesh.axis_size("pipe") > 1:
            MeshOptions(
                schedule=options.schedule,
                num_microbatches=options.microbatches,
                num_chunks=options.num_chunks,
            ).resolved(mesh)


def check_folder_of(name: str, path: str | None) -> None:
    """Finds before the run that its results could not be written.

    Args:
        name: of the flag.
        path: of the file, or None for none.

    Raises:
        ValueError: its folder does not exist, it is a folder itself, or a picture has another
            ending than .png.
    """
    if name == "png" and path and not path.endswith(".png"):
        raise ValueError(f"--png={path} is not the name of a .png file.")
    if path and Path(path).is_dir():
        raise ValueError(f"--{name}={path} is a folder. Name a file in it.")
    if path and not Path(path).absolute().parent.is_dir():
        raise ValueError(
            f"--{name}={path}: the folder {Path(path).absolute().parent} does not exist. Make it "
            "first, or name a file in another one."
        )
