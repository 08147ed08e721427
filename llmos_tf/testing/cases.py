"""The meshes of a verification, each with the options under which a model runs on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy


@dataclass(frozen=True, kw_only=True)
class Case:
    """A mesh and the options under which a model is verified on it.

    Args:
        mesh: the axes.
        zero_stage: as for `MeshStrategy`.
        sequence_parallel: as for `MeshStrategy`.
        layout_map: the user's layouts, or None for the model's own.
        num_microbatches: as for `MeshStrategy`.
        schedule: as for `MeshStrategy`.
        num_chunks: as for `MeshStrategy`.
        context_method: as for `MeshStrategy`.
    """

    mesh: Mesh
    zero_stage: int = 0
    sequence_parallel: bool = False
    layout_map: Mapping | None = None
    num_microbatches: int | None = None
    schedule: str = "1f1b"
    num_chunks: int = 1
    context_method: str = "ring"

    @property
    def parallelism(self) -> str:
        """What the mesh stands for, such as "ZeRO stage 3 + tensor parallel"."""
        return " + ".join(self._kinds()) or "one device of a mesh"

    def _kinds(self) -> list[str]:
        kinds = []
        if self.mesh.axis_size("data") > 1:
            kinds.append("data parallel")
        if self.zero_stage in (1, 2):
            kinds.append(f"ZeRO stage {self.zero_stage}")
        if self.mesh.axis_size("fsdp") > 1:
            kinds.append("ZeRO stage 3")
        if self.mesh.axis_size("tensor") > 1:
            kinds.append("tensor parallel")
        if self.sequence_parallel:
            kinds.append("sequence parallel")
        if self.mesh.axis_size("pipe") > 1:
            kinds.append(f"pipeline {self.schedule}")
        if self.mesh.axis_size("context") > 1:
            kinds.append(f"context parallel ({self.context_method})")
        if self.mesh.axis_size("expert") > 1:
            kinds.append("expert parallel")
        return kinds

    def strategy(self) -> MeshStrategy:
        """Returns a new strategy.

        Returns:
            The strategy of the mesh with the options.

        Raises:
            ValueError: the mesh does not fit the devices or the options.
        """  # noqa: DOC502
        return MeshStrategy(
            self.mesh,
            zero_stage=self.zero_stage,
            layout_map=self.layout_map,
            sequence_parallel=self.sequence_parallel,
            num_microbatches=self.num_microbatches,
            schedule=self.schedule,
            num_chunks=self.num_chunks,
            context_method=self.context_method,
        )


def cases_of(
    meshes: Sequence[Mesh],
    *,
    zero_stage: int,
    sequence_parallel: bool,
    layout_map: Mapping | None,
    num_microbatches: int | None,
    schedule: str,
    num_chunks: int,
    context_method: str,
) -> tuple[Case, ...]:
    """Returns each mesh with the options that apply to it.

    Args:
        meshes: the meshes.
        zero_stage: stages 1 and 2 are for meshes with a `data` axis.
        sequence_parallel: for meshes with a `tensor` axis.
        layout_map: for the same.
        num_microbatches: for meshes with a `pipe` axis.
        schedule: for the same.
        num_chunks: for the same.
        context_method: for meshes with a `context` axis.

    Returns:
        One case for each.

    Raises:
        ValueError: there is no mesh, or none that an option is for.
    """
    if not meshes:
        raise ValueError("At least one mesh is verified, such as data=2. Received none.")
    for what, given, axis in (
        (f"zero_stage={zero_stage} cuts optimizer state along", zero_stage in (1, 2), "data"),
        ("sequence_parallel splits positions over", sequence_parallel, "tensor"),
        ("microbatches go down", (num_microbatches or 1) > 1, "pipe"),
    ):
        if given and all(mesh.axis_size(axis) == 1 for mesh in meshes):
            raise ValueError(
                f"{what} a {axis} axis, which no mesh has. "
                f"Received: {'; '.join(map(str, meshes))}. Add a mesh such as {axis}=2."
            )
    pipeline = {
        "num_microbatches": num_microbatches,
        "schedule": schedule,
        "num_chunks": num_chunks,
    }
    return tuple(
        Case(
            mesh=mesh,
            zero_stage=zero_stage if zero_stage == 3 or mesh.axis_size("data") > 1 else 0,
            sequence_parallel=sequence_parallel and mesh.axis_size("tensor") > 1,
            layout_map=layout_map if mesh.axis_size("tensor") > 1 else None,
            **(pipeline if mesh.axis_size("pipe") > 1 else {}),
            context_method=context_method,
        )
        for mesh in meshes
    )
