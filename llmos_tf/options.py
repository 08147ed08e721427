"""The options of a mesh strategy beside its mesh, checked against it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from llmos_tf.mesh import Mesh
from llmos_tf.planning.plan import REMATERIALISE
from llmos_tf.planning.schedules import Schedule, make_schedule

CONTEXT_METHODS = ("ring", "ulysses")
COMPRESSIONS = ("bf16", "fp16", "int8", "powersgd")
DEFAULT_RANK = 4
OFFLOAD = ("optimizer", "parameters")


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """What `MeshStrategy` takes beside the mesh; its docstring says what each is.

    Raises:
        ValueError: by `resolved`, where an option does not fit the mesh.
    """  # noqa: DOC502

    zero_stage: int = 0
    layout_map: Mapping | None = None
    sequence_parallel: bool = False
    num_microbatches: int | None = None
    schedule: str = "1f1b"
    num_chunks: int = 1
    stage_of: Mapping[str, int] = field(default_factory=dict)
    context_method: str = "ring"
    bucket_bytes: int | None = None
    gradient_compression: str | None = None
    powersgd_rank: int | None = None
    rematerialise: str | int | None = "none"
    offload: str | Iterable[str] | None = None
    host_device: str | None = None
    reshard_after_forward: bool = False

    def resolved(self, mesh: Mesh) -> "MeshOptions":
        """Checks that the options fit a mesh, and says what was left open.

        Args:
            mesh: the mesh.

        Returns:
            The options, with a number of microbatches, a rank for PowerSGD, and what is offloaded
            as a tuple of names of `OFFLOAD`.

        Raises:
            ValueError: an option that is out of range, or needs an axis that the mesh lacks.
        """  # noqa: DOC502
        options = self
        if self.num_microbatches is None:
            # The fewest with which every stage has something to do at the same time.
            options = replace(self, num_microbatches=mesh.axis_size("pipe"))
        if self.gradient_compression == "powersgd" and self.powersgd_rank is None:
            options = replace(options, powersgd_rank=DEFAULT_RANK)
        if self.rematerialise is None:
            options = replace(options, rematerialise="none")
        options = replace(options, offload=offloaded(self.offload))
        options._check_offload(mesh)
        options._check_zero(mesh)
        options._check_rematerialise(mesh)
        options._check_reshard(mesh)
        options._check_positions(mesh)
        options._check_pipe(mesh)
        options._check_gradients(mesh)
        return options

    def _check_zero(self, mesh: Mesh) -> None:
        stage = self.zero_stage
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is 0, 1, 2 or 3. Received: {stage!r}.")
        if stage in (1, 2) and mesh.axis_size("data") == 1 and mesh.size > 1:
            raise ValueError(
                f"zero_stage={stage} cuts optimizer state along the data axis, which has size 1 "
                f"in the mesh {mesh}. Use a data axis, or zero_stage=0 (an fsdp axis cuts "
                "everything by itself)."
            )
        if stage == 3 and mesh.axis_size("fsdp") == 1 and mesh.size > 1:
            raise ValueError(
                "zero_stage=3 cuts parameters along the fsdp axis, which has size 1 in the mesh "
                f"{mesh}. Name the ways to split the batch fsdp in place of data: Mesh(fsdp=...)."
            )

    def _check_rematerialise(self, mesh: Mesh) -> None:
        option = self.rematerialise
        is_bytes = isinstance(option, int) and not isinstance(option, bool) and option > 0
        if not is_bytes and option not in REMATERIALISE:
            raise ValueError(
                f"rematerialise is one of {', '.join(REMATERIALISE)}, or the bytes that blocks may "
                f"keep for the backward pass. Received: {option!r}."
            )
        if is_bytes and mesh.axis_size("pipe") > 1:
            raise ValueError(
                f"rematerialise={option} is a number of bytes, which is for meshes without a pipe "
                "axis: how many microbatches a stage keeps depends on how the model is cut. "
                f"Received: the mesh {mesh}. Take 'block' or 'selective'."
            )

    def _check_offload(self, mesh: Mesh) -> None:
        if self.host_device is not None and not self.offload:
            raise ValueError(
                f"host_device={self.host_device!r} says where offload puts what it takes from the "
                "devices. Received: offload=None. Add offload='optimizer', or leave it out."
            )
        if "parameters" in self.offload and mesh.axis_size("pipe") > 1:
            raise ValueError(
                "A pipeline hands its weights to the loops of its stages, which hold them on the "
                f"device for the whole step. Received: offload={self.offload} with the mesh "
                f"{mesh}. Take offload='optimizer', or fsdp in place of pipe."
            )

    def _check_reshard(self, mesh: Mesh) -> None:
        if not isinstance(self.reshard_after_forward, bool):
            raise ValueError(
                f"reshard_after_forward is True or False. Received: {self.reshard_after_forward!r}."
            )
        if not self.reshard_after_forward or mesh.size == 1:
            return
        if mesh.axis_size("fsdp") == 1:
            raise ValueError(
                "reshard_after_forward=True is for weights that are gathered along the fsdp axis, "
                f"which has size 1 in the mesh {mesh}. Give an fsdp axis, or leave it out."
            )
        if mesh.axis_size("pipe") > 1:
            raise ValueError(
                "reshard_after_forward=True is for meshes without a pipe axis: weights would be "
                f"gathered twice for each microbatch. Received: the mesh {mesh}. Leave it out."
            )

    def _check_positions(self, mesh: Mesh) -> None:
        if self.sequence_parallel and mesh.axis_size("tensor") == 1:
            raise ValueError(
                "sequence_parallel=True splits positions over the tensor axis, which has size 1 in "
                f"the mesh {mesh}. Give a tensor axis, or leave it out."
            )
        if self.context_method not in CONTEXT_METHODS:
            raise ValueError(
                f"context_method is {' or '.join(CONTEXT_METHODS)}. "
                f"Received: {self.context_method!r}."
            )

    def _check_gradients(self, mesh: Mesh) -> None:
        for name in ("bucket_bytes", "powersgd_rank"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise ValueError(f"{name} is a positive integer or None. Received: {value!r}.")
        method = self.gradient_compression
        if method not in (None, *COMPRESSIONS):
            raise ValueError(
                f"gradient_compression is None, {', '.join(COMPRESSIONS[:-1])} or "
                f"{COMPRESSIONS[-1]}. Received: {method!r}."
            )
        if self.powersgd_rank is not None and method != "powersgd":
            raise ValueError(
                f"powersgd_rank={self.powersgd_rank} is for gradient_compression='powersgd'. "
                f"Received: gradient_compression={method!r}."
            )
        if method is None or mesh.size == 1:
            return
        if mesh.axis_size(("data", "expert", "context")) == 1:
            raise ValueError(
                f"gradient_compression={method!r} is for gradients that are summed along data, "
                f"expert or context, and the mesh {mesh} has none of them. What fsdp and tensor "
                "send is part of the forward and backward passes, in their own dtype: take a data "
                "axis, or the dtype policy mixed_bfloat16 to halve that."
            )
        if method == "powersgd" and mesh.axis_size("fsdp") > 1:
            raise ValueError(
                "gradient_compression='powersgd' needs gradients that are matrices, and fsdp cuts "
                f"them into flat pieces in the mesh {mesh}. Take 'int8', or no fsdp axis."
            )
        if method == "powersgd" and self.zero_stage in (1, 2):
            raise ValueError(
                "gradient_compression='powersgd' sums whole matrices, and "
                f"zero_stage={self.zero_stage} wants each rank's flat part of the sum only. Take "
                "'int8', or zero_stage=0."
            )

    def _check_pipe(self, mesh: Mesh) -> None:
        stages = mesh.axis_size("pipe")
        if stages > 1:
            self.make_schedule(mesh)
            if self.num_microbatches < stages and self.schedule != "gpipe":
                raise ValueError(
                    f"The schedule {self.schedule!r} needs at least as many microbatches as there "
                    f"are stages, or some would never work at the same time. Received: "
                    f"num_microbatches={self.num_microbatches} with the mesh {mesh}. Take "
                    f"{stages} or more, or the schedule 'gpipe', which takes any number."
                )
            return
        for name, none in (("num_microbatches", 1), ("num_chunks", 1), ("stage_of", {})):
            value = getattr(self, name)
            if value != none:
                raise ValueError(
                    f"{name}={value!r} is for a pipeline, and the axis pipe has size 1 in the mesh "
                    f"{mesh}. Give a pipe axis, or leave {name} out."
                )

    def make_schedule(self, mesh: Mesh) -> Schedule | None:
        """Returns the schedule of the pipeline.

        Args:
            mesh: the mesh.

        Returns:
            The schedule, or None without a `pipe` axis.

        Raises:
            ValueError: an unknown schedule, or numbers that it does not take.
        """  # noqa: DOC502
        stages = mesh.axis_size("pipe")
        if stages == 1:
            return None
        return make_schedule(self.schedule, stages, self.num_microbatches, self.num_chunks)


def offloaded(option: str | Iterable[str] | None) -> tuple[str, ...]:
    """Returns what the option `offload` names.

    Args:
        option: a name of `OFFLOAD`, several of them, "all", or None.

    Returns:
        Names of `OFFLOAD`, in its order.

    Raises:
        ValueError: another name.

    Example:
        >>> offloaded("all")
        ('optimizer', 'parameters')
    """
    if option is None or isinstance(option, str):
        names = {None: (), "all": OFFLOAD}.get(option, (option,))
    else:
        names = tuple(option) if isinstance(option, Iterable) else (option,)
    if not set(names) <= set(OFFLOAD):
        raise ValueError(
            f"offload is None, {', '.join(map(repr, OFFLOAD))}, a tuple of both, or 'all', which "
            f"is the same. Received: {option!r}."
        )
    return tuple(name for name in OFFLOAD if name in names)
