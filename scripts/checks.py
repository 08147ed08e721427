"""Checks of flags that several programs take. No TensorFlow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmos_tf.mesh import Mesh
from llmos_tf.options import CONTEXT_METHODS, MeshOptions
from llmos_tf.planning.schedules import SCHEDULES


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
            raise ValueError(f"--{name} must be at least 1. Received: {getattr(options, name)}.")


def zero_note(zero_stage: int, mesh: Mesh) -> str | None:
    """Returns what --zero_stage means next to an fsdp axis.

    Args:
        zero_stage: value of the flag.
        mesh: the mesh.

    Returns:
        A sentence, or None where the flag is not given or there is no fsdp axis.
    """
    if not zero_stage or mesh.axis_size("fsdp") == 1:
        return None
    if zero_stage == 3:
        return (
            "--zero_stage=3 changes nothing here: the fsdp axis shards parameters, gradients and "
            "optimizer state by itself."
        )
    return (
        f"--zero_stage={zero_stage} shards optimizer state along data as well; the fsdp axis "
        "shards parameters, gradients and optimizer state by itself."
    )


def check_seed(seed: int) -> None:
    """Checks the value of --seed.

    Args:
        seed: the value.

    Raises:
        ValueError: it is out of range.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"--seed must be from 0 to {2**31 - 1}. Received: {seed}.")


def check_axes(options: Any, meshes: Sequence[Mesh]) -> None:
    """Finds a flag of an axis that no mesh has, or that the axis cannot have.

    Args:
        options: has the flags of axes as fields.
        meshes: those of the program; none where the mesh is not known yet.

    Raises:
        ValueError: such a flag.
    """
    check_counts(options, "num_chunks")
    if options.microbatches is not None:
        check_counts(options, "microbatches")
    for name, known in (("schedule", SCHEDULES), ("context_method", CONTEXT_METHODS)):
        if getattr(options, name) not in known:
            raise ValueError(
                f"--{name} must be one of {', '.join(known)}. Received: {getattr(options, name)!r}."
            )
    for name, default, axis in (
        ("microbatches", None, "pipe"),
        ("schedule", "1f1b", "pipe"),
        ("num_chunks", 1, "pipe"),
        ("context_method", "ring", "context"),
    ):
        given = getattr(options, name)
        if given != default and all(mesh.axis_size(axis) == 1 for mesh in meshes):
            received = "".join(f" --mesh={mesh}" for mesh in meshes) or " no --mesh"
            raise ValueError(
                f"--{name}={given} is for the axis {axis}, which has size 1. Received:{received}. "
                f"Add {axis}=2 to it, or leave --{name} out."
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
        ValueError: its folder does not exist, or a picture has another ending than .png.
    """
    if name == "png" and path and not path.endswith(".png"):
        raise ValueError(f"--png={path} is not the name of a .png file.")
    if path and not Path(path).absolute().parent.is_dir():
        raise ValueError(
            f"--{name}={path}: the folder {Path(path).absolute().parent} does not exist. Make it "
            "first, or name a file in another one."
        )
