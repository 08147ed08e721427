"""What the flags of llmos-benchmark said, as one checked object."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from llmos_tf.mesh import AXES, Mesh
from llmos_tf.options import MeshOptions
from llmos_tf.scripts.checks import check_counts, check_folder_of
from llmos_tf.scripts.peers import kinds
from llmos_tf.scripts.peers.workload import Job, Workload

# What a run of ours may say besides its mesh, and what MeshStrategy calls it.
_MESH_OPTIONS = {
    "schedule": "schedule",
    "microbatches": "num_microbatches",
    "num_chunks": "num_chunks",
    "zero_stage": "zero_stage",
    "context_method": "context_method",
    "sequence_parallel": "sequence_parallel",
    "rematerialise": "rematerialise",
    "bucket_bytes": "bucket_bytes",
    "gradient_compression": "gradient_compression",
    "powersgd_rank": "powersgd_rank",
    "reshard_after_forward": "reshard_after_forward",
    "offload": "offload",
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A run of llmos-benchmark: what one `--run` says.

    Args:
        text: as it was written.
        name: as results name it: the text, and which of several with the same one.
        kind: name of the kind: ``step`` and ``fit`` are ours.
        devices: how many.
        mesh: of a run of ours.
        options: what it says besides.
    """

    text: str
    name: str
    kind: str
    devices: int
    mesh: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """Returns the run that a `--run` describes.

        Args:
            text: ``MESH``, ``MESH:name=value,...``, ``fit:`` and one of these, or a kind of
                `peers.kinds` in its form.

        Returns:
            The run, checked.

        Raises:
            ValueError: an unknown kind or option, or options that do not fit the mesh or kind.
        """  # noqa: DOC502
        head, _, rest = text.partition(":")
        name, _, size = head.partition("=")
        if name in kinds.KINDS:
            try:
                devices, options = kinds.parse(name, size, rest)
            except ValueError as error:
                raise ValueError(f"--run={text}: {error}") from error
            return cls(text=text, name=text, kind=name, devices=devices, mesh="", options=options)
        kind = "step"
        if head == "fit":
            kind, (head, _, rest) = "fit", rest.partition(":")
        if head != "1" and head.partition("=")[0] not in AXES:
            raise ValueError(
                f"--run={text} is no kind of run. Ours are a mesh of {', '.join(AXES)}, such as "
                "data=2, or 1 for one device, and fit: before a mesh; the others "
                f"{', '.join(map(kinds.form, kinds.KINDS))}."
            )
        mesh = Mesh.from_string(head)
        options = _mesh_options(text, mesh, rest)
        return cls(text=text, name=text, kind=kind, devices=mesh.size, mesh=head, options=options)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What the flags of llmos-benchmark said, checked. Fields have the flags' names and meanings.

    Raises:
        ValueError: a value that no benchmark can have.
    """  # noqa: DOC502

    run: tuple[str, ...]
    ratio: tuple[str, ...]
    rounds: int
    steps_in_round: int
    patience: int
    threads_per_device: int | None
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_layers: int
    seq_len: int
    global_batch: int
    seed: int
    json: str | None
    png: str | None

    def __post_init__(self):
        check_counts(self, "rounds", "steps_in_round", "patience", "seq_len", "global_batch")
        if self.threads_per_device is not None:
            check_counts(self, "threads_per_device")
        for name in ("json", "png"):
            check_folder_of(name, getattr(self, name))
        # Finds sizes that no model has.
        _ = self.workload.config
        for candidate in self.candidates:
            self._check_fit(candidate)
        _ = self.pairs

    @property
    def candidates(self) -> list[Candidate]:
        """The runs, of which no two have the same name."""
        found: list[Candidate] = []
        for text in self.run:
            one = Candidate.parse(text)
            same = sum(other.text == text for other in found)
            found.append(replace(one, name=f"{text}#{same + 1}") if same else one)
        return found

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Names of the runs whose ratios are asked for besides those to the first run.

        Raises:
            ValueError: a name that no run has.
        """
        names = [candidate.name for candidate in self.candidates]
        found = []
        for text in self.ratio:
            one, _, other = text.partition("/")
            if one not in names or other not in names:
                raise ValueError(
                    f"--ratio={text} is RUN/RUN, of two of the runs {', '.join(names)}."
                )
            found.append((one, other))
        return found

    @property
    def workload(self) -> Workload:
        """What all runs train."""
        names = ("vocab_size", "hidden_size", "num_heads", "num_layers")
        model = {name: getattr(self, name) for name in names} | {"max_positions": self.seq_len}
        return Workload(model=model, global_batch=self.global_batch, seed=self.seed)

    def job(self, candidate: Candidate) -> Job:
        """Returns what the processes of a run are told.

        Args:
            candidate: the run.

        Returns:
            The job of the first process.
        """
        return Job(
            kind=candidate.kind,
            devices=candidate.devices,
            options=candidate.options,
            workload=self.workload,
            mesh=candidate.mesh,
            threads_per_device=self.threads_per_device,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, and the whole workload, as JSON takes them."""
        return asdict(self) | {"workload": asdict(self.workload)}

    def _check_fit(self, candidate: Candidate) -> None:
        """Finds a run that cannot have this workload, by its numbers alone."""
        if candidate.kind in kinds.KINDS:
            try:
                kinds.KINDS[candidate.kind].check(
                    self.workload, candidate.devices, candidate.options
                )
            except ValueError as error:
                raise ValueError(f"--run={candidate.text}: {error}") from error
            return
        parts = Mesh.from_string(candidate.mesh).batch_ways * candidate.options["num_microbatches"]
        if self.global_batch % parts:
            raise ValueError(
                f"--global_batch={self.global_batch} is cut into {parts} parts by "
                f"--run={candidate.text}. Take a multiple of {parts}."
            )


def _mesh_options(text: str, mesh: Mesh, rest: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        name, _, value = item.partition("=")
        if name not in _MESH_OPTIONS or not value:
            raise ValueError(
                f"--run={text}: after the mesh come {', '.join(_MESH_OPTIONS)}, as name=value. "
                f"Received: {item!r}."
            )
        options[_MESH_OPTIONS[name]] = int(value) if value.isdecimal() else value
    for name in ("sequence_parallel", "reshard_after_forward"):
        if name in options:
            options[name] = str(options[name]).lower() in ("1", "true")
    resolved = MeshOptions(**options).resolved(mesh)
    options["num_microbatches"] = resolved.num_microbatches
    return options
