"""A training step, as far as planning has to know it. No TensorFlow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmos_tf.config import ModelConfig
from llmos_tf.mesh import Mesh
from llmos_tf.planning.schedules import make_schedule


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """A training step of one of the project's models on a mesh.

    Args:
        config: sizes of a GPT, Llama or Mixtral.
        mesh: the mesh.
        global_batch: rows of a step.
        sequence_length: positions of a row.
        zero_stage: as of `MeshStrategy`, as are the next five.
        sequence_parallel: over the axis `tensor`.
        num_microbatches: of a pipeline; None for as many as stages.
        schedule: of a pipeline.
        num_chunks: of a pipeline.
        context_method: "ring" or "ulysses".
        reshard_after_forward: whether weights of blocks that were gathered along `fsdp` are
            gathered again for the backward pass.
        blocks_of_part: number of blocks in each part of a pipeline; None for as many in each, the
            first ones one more where that does not go up.
        weight_bytes: bytes of an element of weights, gradients and losses.
        activation_bytes: bytes of an element of activations.

    Raises:
        ValueError: sizes that do not go up.
    """

    config: ModelConfig
    mesh: Mesh
    global_batch: int
    sequence_length: int
    zero_stage: int = 0
    sequence_parallel: bool = False
    num_microbatches: int | None = None
    schedule: str = "1f1b"
    num_chunks: int = 1
    context_method: str = "ring"
    reshard_after_forward: bool = False
    blocks_of_part: Sequence[int] | None = None
    weight_bytes: int = 4
    activation_bytes: int = 4

    def __post_init__(self):
        ways = self.mesh.batch_ways * self.microbatches
        if self.global_batch % ways:
            raise ValueError(
                f"A batch of {self.global_batch} rows is no multiple of {ways}: "
                f"{self.microbatches} microbatch(es) of {self.mesh.batch_ways} replica(s). Take "
                "one that is."
            )
        unit = self._length_unit(self.position_axes)
        if self.sequence_length % unit:
            raise ValueError(
                f"{self.sequence_length} positions cannot be split over the mesh {self.mesh}. Take "
                f"a multiple of {unit}."
            )
        blocks = self.blocks_by_part
        if len(blocks) != len(self.stage_of_part) or sum(blocks) != self.config.num_layers:
            raise ValueError(
                f"{self.config.num_layers} blocks lie in {len(self.stage_of_part)} part(s). "
                f"Received: blocks_of_part={self.blocks_of_part}."
            )

    def size(self, axes: str | Sequence[str]) -> int:
        """Returns the number of ranks along axes.

        Args:
            axes: an axis name or several.

        Returns:
            Ranks in a group.
        """
        return self.mesh.axis_size(axes)

    # --- the pipeline -----------------------------------------------------------------------------

    @property
    def microbatches(self) -> int:
        """How many there are; 1 without a pipeline."""
        stages = self.size("pipe")
        return 1 if stages == 1 else self.num_microbatches or stages

    @property
    def stage_of_part(self) -> tuple[int, ...]:
        """The stage of each part of the model."""
        stages = self.size("pipe")
        if stages == 1:
            return (0,)
        schedule = make_schedule(self.schedule, stages, self.microbatches, self.num_chunks)
        return tuple(map(schedule.stage_of_part, range(schedule.num_parts)))

    @property
    def blocks_by_part(self) -> tuple[int, ...]:
        """The number of blocks in each part."""
        if self.blocks_of_part is not None:
            return tuple(self.blocks_of_part)
        parts = len(self.stage_of_part)
        each, more = divmod(self.config.num_layers, parts)
        return tuple(each + (part < more) for part in range(parts))

    def blocks_on(self, stage: int) -> int:
        """Returns the number of blocks on a stage.

        Args:
            stage: of the pipeline; 0 without one.

        Returns:
            Blocks of all its parts.
        """
        pairs = zip(self.stage_of_part, self.blocks_by_part, strict=True)
        return sum(blocks for owner, blocks in pairs if owner == stage)

    # --- the stream -------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of a microbatch, of a replica."""
        return self.global_batch // (self.mesh.batch_ways * self.microbatches)

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Axes whose ranks split the rows of a replica."""
        experts = self.size("expert")
        return ("expert",) if experts > 1 and self.rows % experts == 0 else ()

    @property
    def position_axes(self) -> tuple[str, ...]:
        """Axes whose ranks split positions: the experts' too, where they cannot split rows."""
        context = ("context",) if self.size("context") > 1 else ()
        if self.size("expert") == 1 or self.row_axes:
            return context
        both = ("expert", *context)
        return context if self.sequence_length % self._length_unit(both) else both

    def _length_unit(self, axes: tuple[str, ...]) -> int:
        """What positions are a multiple of: in zigzag a rank has two pieces of them."""
        pieces = 2 if axes and self.context_method == "ring" else 1
        split = self.size("tensor") if self.sequence_parallel else 1
        return self.size(axes) * math.lcm(pieces, split)

    @property
    def stream_axes(self) -> tuple[str, ...]:
        """Axes whose ranks have other rows or positions of a replica's rows."""
        return (*self.row_axes, *self.position_axes)

    @property
    def stream_rows(self) -> int:
        """B, rows of a rank."""
        return self.rows // self.size(self.row_axes)

    @property
    def stream_length(self) -> int:
        """L, positions of a rank, in a tensor-parallel region."""
        return self.sequence_length // self.size(self.position_axes)
