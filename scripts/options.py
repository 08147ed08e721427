"""The options of each program, checked. No TensorFlow.

A value that no run can have is found here, before a device is created or a file is read.
"""

from dataclasses import asdict, dataclass
from typing import Any

from llmos_tf.inference.sampling_config import SamplingConfig
from llmos_tf.mesh import Mesh
from llmos_tf.options import REMATERIALISE, MeshOptions
from llmos_tf.scripts.checks import check_axes, check_counts, check_folder_of, check_seed

_DTYPES = ("float64", "float32", "mixed_bfloat16", "mixed_float16")
# Options of a run that belong to its mesh: another mesh has its own.
OF_THE_MESH = (
    "zero_stage",
    "sequence_parallel",
    "microbatches",
    "schedule",
    "num_chunks",
    "context_method",
    "gradient_compression",
    "rematerialise",
    "offload",
    "reshard_after_forward",
    "virtual_devices",
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of training, evaluation and generation. Fields have the names of the flags.

    `mesh` is None until TensorFlow is asked for the devices. `checkpoint` is the one that is read,
    None in a run that begins.

    Raises:
        ValueError: a value that no run can have.
    """

    preset: str
    mesh: str | None
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
        if self.virtual_devices is not None:
            check_counts(self, "virtual_devices")
        if self.seq_len is not None and self.seq_len < 2:
            raise ValueError(f"--seq_len must be at least 2. Received: {self.seq_len}.")
        if not self.learning_rate > 0:
            raise ValueError(f"--learning_rate must be above 0. Received: {self.learning_rate}.")
        check_seed(self.seed)
        for name in ("data", "mesh"):
            if getattr(self, name) == "":
                raise ValueError(f"--{name} is empty. See --help for what it takes.")
        check_folder_of("json", self.json)
        if self.rematerialise not in REMATERIALISE and not self.rematerialise.isdecimal():
            raise ValueError(
                f"--rematerialise must be one of {', '.join(REMATERIALISE)}, or a number of bytes. "
                f"Received: {self.rematerialise!r}."
            )
        check_axes(self, [] if self.mesh is None else [self.parsed_mesh])
        if self.mesh is not None:
            self._check_mesh()

    def _check_mesh(self) -> None:
        mesh = self.parsed_mesh
        MeshOptions(
            zero_stage=self.zero_stage,
            sequence_parallel=self.sequence_parallel,
            num_microbatches=self.microbatches,
            schedule=self.schedule,
            num_chunks=self.num_chunks,
            context_method=self.context_method,
            gradient_compression=self.gradient_compression,
            rematerialise=self.recomputation,
            offload=self.offload,
            reshard_after_forward=self.reshard_after_forward,
        ).resolved(mesh)
        ways, of = self.batch_parts, "data × fsdp"
        if self.num_microbatches > 1:
            of += " × microbatches"
        if self.global_batch % ways:
            raise ValueError(
                f"--global_batch={self.global_batch} is split over {of} = {ways} parts with the "
                f"mesh {mesh}, and they do not divide it. Take a multiple of {ways}."
            )

    @property
    def parsed_mesh(self) -> Mesh:
        """The mesh, without devices."""
        return Mesh.from_string(self.mesh)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a replica's rows."""
        return self.microbatches or self.parsed_mesh.axis_size("pipe")

    @property
    def batch_parts(self) -> int:
        """Parts into which a batch is split, over replicas and microbatches."""
        return self.parsed_mesh.batch_ways * self.num_microbatches

    @property
    def recomputation(self) -> str | int:
        """What `MeshStrategy` takes as `rematerialise`."""
        return int(self.rematerialise) if self.rematerialise.isdecimal() else self.rematerialise

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of llmos-generate: those of a run, and fields with the names of its flags.

    Raises:
        ValueError: no prompt, or sampling that does not exist.
    """

    run: RunOptions
    prompt: str
    max_new_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    raw: bool

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("The text to continue is missing. Give --prompt='some text'.")
        self.sampling(vocab_size=None)

    def sampling(self, vocab_size: int | None) -> SamplingConfig:
        """Returns how tokens are chosen.

        Args:
            vocab_size: of the tokenizer.

        Returns:
            The configuration.

        Raises:
            ValueError: a value out of its range.
        """  # noqa: DOC502
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.run.seed,
            vocab_size=vocab_size,
        )


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of llmos-verify. Fields have the names of the flags.

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
        check_seed(self.seed)
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"--dtype must be one of {', '.join(_DTYPES)}. Received: {self.dtype!r}."
            )
        if len(set(map(str, self.parsed_meshes))) < len(self.mesh):
            raise ValueError(
                f"A mesh is given twice. Received: --mesh={' --mesh='.join(self.mesh)}."
            )
        check_axes(self, self.parsed_meshes)
        check_folder_of("json", self.json)

    @property
    def parsed_meshes(self) -> list[Mesh]:
        """The meshes, without devices."""
        return [Mesh.from_string(text) for text in self.mesh]
