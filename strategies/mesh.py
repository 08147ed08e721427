"""The general strategy: any mesh."""

from collections.abc import Mapping

import tensorflow as tf

from llmos_tf import devices
from llmos_tf.mesh import Mesh
from llmos_tf.strategies.base import MeshExtended


class MeshStrategy(tf.distribute.MirroredStrategy):
    """Trains Keras models over a mesh of devices, with the weights of one device.

    Args:
        mesh: the axes, and optionally the devices.
        zero_stage: 0 keeps optimizer state on every rank; 1 and 2 cut it along `data` (ZeRO,
            arXiv 1910.02054; 2 keeps only that part of accumulated gradients too); 3 says that
            parameters are cut too, along `fsdp`. An `fsdp` axis cuts parameters, gradients and
            optimizer state at any stage.
        layout_map: `keras.distribution.LayoutMap` or mapping from variable path to axes, for the
            `tensor` axis. None takes the model's own table.
        sequence_parallel: also split activations between blocks along positions over `tensor`
            (arXiv 2205.05198).

    Raises:
        ValueError: the mesh does not fit the devices, or the options do not fit the mesh.

    Example:
        >>> strategy = MeshStrategy(Mesh(data=2, tensor=2))
        >>> with strategy.scope():
        ...     model = llmos_tf.models.GPT.from_preset("gpt_tiny")
        ...     model.compile("adamw", llmos_tf.layers.TokenCrossEntropy())
        >>> model.fit(dataset)
    """

    # `tf.distribute` looks for it on the class of the strategy.
    _collective_key_base = 0

    def __init__(
        self,
        mesh: Mesh,
        *,
        zero_stage: int = 0,
        layout_map: Mapping | None = None,
        sequence_parallel: bool = False,
    ):
        if not isinstance(mesh, Mesh):
            raise ValueError(
                f"MeshStrategy takes an llmos_tf.Mesh, such as Mesh(data=2). Received: {mesh!r}."
            )
        _check_options(mesh, zero_stage, sequence_parallel)
        extended = MeshExtended(
            self, devices.resolve(mesh), zero_stage, layout_map, sequence_parallel
        )
        # Past MirroredStrategy's own constructor, which would make its own `extended`.
        tf.distribute.Strategy.__init__(self, extended)

    @property
    def mesh(self) -> Mesh:
        """The mesh, with full device names."""
        return self.extended.mesh

    @property
    def num_traces(self) -> int:
        """How many programs were traced so far."""
        return self.extended.engine.num_traces


def _check_options(mesh: Mesh, zero_stage: int, sequence_parallel: bool) -> None:
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage is 0, 1, 2 or 3. Received: {zero_stage!r}.")
    if zero_stage in (1, 2) and mesh.axis_size("data") == 1 and mesh.size > 1:
        raise ValueError(
            f"zero_stage={zero_stage} cuts optimizer state along the data axis, which has size 1 "
            f"in the mesh {mesh}. Use a data axis, or zero_stage=0 (an fsdp axis cuts everything "
            "by itself)."
        )
    if zero_stage == 3 and mesh.axis_size("fsdp") == 1 and mesh.size > 1:
        raise ValueError(
            "zero_stage=3 cuts parameters along the fsdp axis, which has size 1 in the mesh "
            f"{mesh}. Name the ways to split the batch fsdp in place of data: Mesh(fsdp=...)."
        )
    if sequence_parallel and mesh.axis_size("tensor") == 1:
        raise ValueError(
            "sequence_parallel=True splits positions over the tensor axis, which has size 1 in "
            f"the mesh {mesh}. Give a tensor axis, or leave it out."
        )
    for axis in ("pipe", "context", "expert"):
        if mesh.axis_size(axis) > 1:
            raise ValueError(
                f"The axis {axis} is not available in this version. Received: the mesh {mesh}. "
                "Use data, fsdp and tensor."
            )
