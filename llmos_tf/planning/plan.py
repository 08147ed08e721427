"""A run whose memory is asked for."""

from dataclasses import dataclass, field

from llmos_tf.config import MixtralConfig, ModelConfig
from llmos_tf.mesh import Mesh
from llmos_tf.planning.activations import WIDE, Tokens
from llmos_tf.planning.schedules import Schedule
from llmos_tf.planning.weights import Weight, weights_of

# Of the options of `MeshStrategy` those that are no number.
REMATERIALISE = ("none", "full", "block", "selective")
# Bytes of a number that is computed with, by Keras's dtype policies. Weights are float32.
COMPUTE_BYTES = {"float32": WIDE, "mixed_float16": 2, "mixed_bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run whose memory is asked for.

    Args:
        config: of the model.
        mesh: of devices, which need not exist.
        global_batch: rows of a step.
        seq_len: positions of a row.
        zero_stage: as for `MeshStrategy`.
        sequence_parallel: as for `MeshStrategy`.
        context_method: as for `MeshStrategy`.
        schedule: of the pipeline, or None.
        optimizer_slots: how many numbers the optimizer keeps for each weight.
        optimizer_scalars: bytes that it keeps beside them.
        update: "fused" where large weights are updated in place and small ones end to end in
            groups, "keras" where Keras's ops do it by themselves, as without a strategy.
        decays: whether the optimizer decays weights.
        early_values: how many copies of all that is updated, changed, are there from the beginning
            of a step.
        compute_bytes: size of a number that is computed with, 4 or 2.
        bucket_bytes: of gradients that are reduced together, or None.
        rematerialise: as for `MeshStrategy`, but no number of bytes.
        offload: what lies on the host: "optimizer" and "parameters", or some of them.
        reshard_after_forward: as for `MeshStrategy`.

    Raises:
        ValueError: another `rematerialise`, rows or positions that cannot be dealt to the devices.
    """

    config: ModelConfig
    mesh: Mesh
    global_batch: int
    seq_len: int
    zero_stage: int = 0
    sequence_parallel: bool = False
    context_method: str = "ring"
    schedule: Schedule | None = None
    optimizer_slots: int = 2
    optimizer_scalars: int = 12
    update: str = "fused"
    decays: bool = False
    early_values: int = 0
    compute_bytes: int = WIDE
    bucket_bytes: int | None = None
    rematerialise: str = "none"
    offload: tuple[str, ...] = ()
    reshard_after_forward: bool = False
    weights: list[Weight] = field(init=False, repr=False)

    def __post_init__(self):
        if self.rematerialise not in REMATERIALISE:
            raise ValueError(
                f"An estimate takes rematerialise as one of {', '.join(REMATERIALISE)}. Received: "
                f"{self.rematerialise!r}. What a number of bytes comes to is counted of a model by "
                "memory.report."
            )
        object.__setattr__(self, "weights", weights_of(self.config, self.mesh))
        parts = self.mesh.batch_ways * self.num_microbatches
        if self.global_batch % parts:
            raise ValueError(
                f"The rows of a step are dealt to data x fsdp = {self.mesh.batch_ways} parts of "
                f"{self.num_microbatches} microbatch(es) each. Received: global_batch="
                f"{self.global_batch}, which {parts} does not divide."
            )
        pieces = self.size("context")
        if self.seq_len % pieces:
            raise ValueError(
                f"A context axis of {pieces} splits positions into equal parts. "
                f"Received: seq_len={self.seq_len}."
            )

    def size(self, axis: str) -> int:
        """Returns the size of a mesh axis.

        Args:
            axis: its name.

        Returns:
            The size.
        """
        return self.mesh.axis_size(axis)

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step; 1 without a pipeline."""
        return 1 if self.schedule is None else self.schedule.num_microbatches

    @property
    def tokens(self) -> Tokens:
        """The tokens of a device in a microbatch. Ranks of `expert` split rows, or positions."""
        rows = self.global_batch // self.mesh.batch_ways // self.num_microbatches
        positions = self.seq_len / self.size("context")
        experts = self.size("expert") if isinstance(self.config, MixtralConfig) else 1
        split_rows = rows % experts == 0
        return Tokens(
            rows=rows / experts if split_rows else rows,
            positions=positions if split_rows else positions / experts,
            tensor=self.size("tensor"),
            context=self.size("context") if split_rows else self.size("context") * experts,
            context_method=self.context_method,
            sequence_parallel=self.sequence_parallel,
            compute_bytes=self.compute_bytes,
            in_parts=self.schedule is not None,
        )
