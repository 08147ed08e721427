"""What a model and a step of it take on each device, by closed formulas. No TensorFlow.

Weights and optimizer state follow ZeRO (arXiv 1910.02054) to the byte, padding included. Within the
step the fullest moment is one of four, since between them memory grows or shrinks block by block:

- *turn*: the forward pass is through: all that is kept, with logits and the slope of the loss;
- *head*: the gradients of the last product are made of the slope;
- *last block*: the logits are gone, and either half of the last block is differentiated;
- *end*: all gradients are there, and are laid into buckets for their reduction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llmos_tf.config import GPTConfig, MixtralConfig, ModelConfig
from llmos_tf.mesh import Mesh
from llmos_tf.planning import activations
from llmos_tf.planning.activations import WIDE, Tokens
from llmos_tf.planning.buckets import default_bucket_bytes, plan_buckets
from llmos_tf.planning.stages import PER_ELEMENT, stages_of_units
from llmos_tf.planning.weights import FIRST, LAST, Weight, total, weights_of
from llmos_tf.strategies.schedules import Schedule

# What a device holds, by kind; `HOST` lies in the memory of its host.
HOST = "host"
KINDS = ("parameters", "gradients", "optimizer", "activations", "communication", "other")
# As in `strategies.fused_update` and `fusion`.
GROUP_BYTES = 4 * 2**20
MIN_ELEMENTS = 2**15
REMAT = ("none", "block")


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
        compute_bytes: size of a number that is computed with, 4 or 2.
        bucket_bytes: of gradients that are reduced together, or None.
        remat: "none", or "block" where each block is computed again in the backward pass.
        offload: what lies on the host: "optimizer" and "parameters", or some of them.
        reshard_after_forward: as for `MeshStrategy`.

    Raises:
        ValueError: another `remat`, rows or positions that cannot be dealt to the devices.
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
    compute_bytes: int = WIDE
    bucket_bytes: int | None = None
    remat: str = "none"
    offload: tuple[str, ...] = ()
    reshard_after_forward: bool = False
    weights: list[Weight] = field(init=False, repr=False)

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat is one of {', '.join(REMAT)}. Received: {self.remat!r}.")
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


def memory_of(plan: Plan) -> list[dict[str, int]]:
    """Returns what each stage's devices hold at the fullest moment of a step.

    Args:
        plan: the run.

    Returns:
        For each stage of the pipeline, or the only one, bytes by kind, `KINDS`, and on its `HOST`.
    """
    return [_Stage(plan, units).memory(stage) for stage, units in enumerate(_units_by_stage(plan))]


class _Stage:
    """The devices that hold some units of a model: embeddings, blocks, last norm and logits."""

    def __init__(self, plan: Plan, units: Sequence[str | int]):
        self._plan, self._units = plan, set(units)
        self._mesh = plan.mesh
        self._weights = [w for w in plan.weights if not self._units.isdisjoint(w.units)]
        self._num_blocks = sum(isinstance(unit, int) for unit in units)

    def memory(self, stage: int) -> dict[str, int]:
        plan = self._plan
        within = max(self._moments(stage), key=lambda moment: sum(moment.values()))
        slots = plan.optimizer_slots * WIDE * self._updated_elements()
        whole = {
            "parameters": WIDE * total(self._weights, lambda w: w.part_elements(self._mesh)),
            "optimizer": slots + plan.optimizer_scalars,
            "other": self._copies(0) + within.get("other", 0.0),
        }
        offloaded = {kind: whole.pop(kind) for kind in plan.offload}
        memory = {kind: round(whole.get(kind, within.get(kind, 0))) for kind in KINDS}
        return {**memory, HOST: sum(offloaded.values())}

    # --- moments ----------------------------------------------------------------------------------

    def _moments(self, stage: int) -> list[dict[str, float]]:
        if self._plan.schedule is not None:
            return self._in_pipeline(stage)
        rest = self._recomputed() if self._plan.remat == "block" else self._last_block()
        passes = [*self._turn(), *rest]
        wide = self._plan.compute_bytes == WIDE
        if self._plan.update == "keras" and self._plan.decays and wide:
            # Weights decay at the beginning, into copies: the passes still read them.
            passes = [{**m, "other": WIDE * self._updated_elements()} for m in passes]
        passes += self._buckets()
        if "parameters" in self._plan.offload:
            copies = self._copies_of_host(self._plan.config.num_layers + 1)
            passes = [{"other": copies, **moment} for moment in passes]
        return [*passes, *self._update()]

    def _turn(self) -> list[dict[str, float]]:
        """With the logits and their slope; and with the slope and the last product's gradients."""
        config, tokens = self._plan.config, self._plan.tokens
        logits, stream = (
            activations.of_logits(config, tokens),
            activations.of_stream(config, tokens),
        )
        kept = self._kept() + activations.of_head(config, tokens)
        # In 16 bits the gradient of whole logits is there before they are gone.
        narrow = 0.0 if tokens.compute_bytes == WIDE else tokens.compute_bytes / WIDE * logits
        cast = narrow if tokens.tensor == 1 else 0.0
        sent = self._gathered(0)
        return [
            {"activations": kept + logits + cast, "communication": sent},
            {
                "activations": kept + stream,
                "gradients": self._table_gradient(),
                "communication": sent,
            },
        ]

    def _last_block(self) -> list[dict[str, float]]:
        config, tokens = self._plan.config, self._plan.tokens
        stream = activations.of_stream(config, tokens)
        own = [w for w in self._weights if w.units[-1] in (LAST, config.num_layers - 1)]
        kernels = ("down/kernel", "experts/down")
        # A gate's two gradients are laid together.
        is_gpt = isinstance(config, GPTConfig)
        moments = []
        for temporary, names in (
            (stream + (1 if is_gpt else 2) * activations.of_hidden(config, tokens), kernels),
            (
                # What the other half kept is gone, with its norm's result.
                activations.in_gradient_of_attention(config, tokens)
                - activations.of_feed_forward(config, tokens)
                - stream,
                (*kernels, "up/kernel", "experts/up", "output/kernel"),
            ),
        ):
            made = [w for w in own if LAST in w.units or w.name in names]
            moments.append(
                {
                    "activations": self._kept() + temporary,
                    "gradients": WIDE * total(made, lambda w: w.slice_elements(self._mesh)),
                    # Where blocks let go: of the last one and the one before it, again.
                    "communication": self._gathered(2, made),
                    "other": self._copies(2, made) - self._copies(0),
                }
            )
        return moments

    def _recomputed(self) -> list[dict[str, float]]:
        """While a block is computed again: the last one, or the first one, after all others."""
        config, tokens = self._plan.config, self._plan.tokens
        halves = activations.while_recomputed(config, tokens)
        others = (self._num_blocks - 1) * activations.of_stream(config, tokens)
        blocks = config.num_layers
        head = [w for w in self._weights if LAST in w.units]
        own = [w for w in self._weights if w.units[-1] == blocks - 1]
        moments = []
        for bytes_now, kernels in zip(halves, (("down",), ("down", "up", "output/")), strict=True):
            first = self._made_before_first_block(kernels) - self._updated_early()
            made = [*head, *(w for w in own if any(name in w.name for name in kernels))]
            last = WIDE * total(made, lambda w: w.slice_elements(self._mesh))
            for activated, gradients, unfinished in (
                (bytes_now + others, last, blocks),
                # The block after is not quite through.
                (bytes_now + activations.of_stream(config, tokens), first, 1),
            ):
                copies = self._copies_of_host(unfinished)
                moments.append({"activations": activated, "gradients": gradients, "other": copies})
        return moments

    def _buckets(self) -> list[dict[str, float]]:
        """When a bucket of gradients is full, and they are laid together."""
        plan, mesh = self._plan, self._mesh
        if mesh.axis_size("fsdp") > 1:
            # The largest gradient, cut into what each rank gets, and these in a row.
            largest = WIDE * max(w.slice_elements(mesh) for w in self._weights)
            return [{"gradients": 2 * largest, "communication": self._gathered(0)}]
        if mesh.batch_ways == 1:
            return []
        scatters = plan.zero_stage in (1, 2)
        # The bucket and its sum, or its rows for each rank, and these in a row.
        moments, blocks = [], self._num_blocks
        of_block = activations.of_stream if plan.remat == "block" else activations.of_block
        kept = of_block(plan.config, plan.tokens)
        full = self._full_buckets()
        # The embeddings' gradients come at once with the first block's.
        last = sum(bucket for unit, bucket in full if unit in (FIRST, 0))
        for unit, bucket in [*(one for one in full if one[0] not in (FIRST, 0)), (FIRST, last)]:
            unfinished = 0 if unit == FIRST else blocks if unit == LAST else unit
            moments.append(
                {
                    "activations": unfinished * kept,
                    "gradients": (2 if scatters else 1) * bucket,
                    "communication": bucket,
                    "other": self._copies_of_host(unfinished),
                }
            )
        return moments

    def _full_buckets(self) -> list[tuple[str | int, int]]:
        """Buckets of gradients: the unit of the model that most of each comes from, and bytes."""
        # In the order of the backward pass: what is used last first.
        units = [LAST, *range(self._plan.config.num_layers - 1, -1, -1), FIRST]
        weights = [w for u in units for w in reversed(self._weights) if w.units[0] == u]
        sizes = dict(enumerate(WIDE * w.slice_elements(self._mesh) for w in weights))
        limit = self._plan.bucket_bytes
        if limit is None:
            limit = default_bucket_bytes(self._mesh.batch_ways, sum(sizes.values()))
        buckets = plan_buckets(dict.fromkeys(sizes), sizes, {i: i for i in sizes}, {None: limit})
        return [
            (
                weights[max(bucket.members, key=sizes.get)].units[0],
                sum(sizes[i] for i in bucket.members),
            )
            for bucket in buckets
        ]

    def _updated_early(self) -> float:
        """Gradients that are used up before the first block's are made."""
        if self._plan.update == "keras":
            return 0.0
        full = [bucket for unit, bucket in self._full_buckets() if unit not in (FIRST, 0)]
        # The last of them is on its way.
        return sum(full[:-1])

    def _update(self) -> list[dict[str, float]]:
        """When the optimizer is at work."""
        plan, updated = self._plan, WIDE * self._updated_elements()
        if plan.offload and plan.optimizer_slots:
            return self._update_beside_host()
        if plan.update == "keras":
            # What is added to each moment is computed when its gradient is there, for all at once.
            return [{"gradients": 2 * updated}]
        sizes = [WIDE * w.part_elements(self._mesh, self._update_axes()) for w in self._weights]
        small = sum(size for size in sizes if size < WIDE * MIN_ELEMENTS)
        # Of one group after another weights and moments, the gradients, and what they change; or
        # all that has been decayed.
        group = min(GROUP_BYTES, small)
        decayed = small if plan.decays else 0
        whole = self._gradient_bytes() if plan.zero_stage in (1, 2) else 0
        return [
            # New weights, gathered, and each by itself.
            {"gradients": whole, "communication": whole},
            # Each large weight when its gradient is there; that of a table in two parts, which are
            # summed.
            {"gradients": 2 * max(sizes)},
            {
                "gradients": small + (1 if decayed else 2) * group,
                "other": (1 + plan.optimizer_slots) * group + decayed,
            },
        ]

    def _update_beside_host(self) -> list[dict[str, float]]:
        """When a group is changed whose state, or whose weights, are on the host."""
        updated = WIDE * self._updated_elements()
        group = min(GROUP_BYTES, updated)
        if "optimizer" not in self._plan.offload:
            # Gradients, what they change and the change, and moments.
            slots = self._plan.optimizer_slots
            return [{"gradients": updated + 2 * group, "other": slots * group}]
        # What comes back.
        return [] if "parameters" in self._plan.offload else [{"gradients": group}]

    def _in_pipeline(self, stage: int) -> list[dict[str, float]]:
        """While the backward pass of a microbatch holds all that it was given.

        It does until it is through: at the feed-forward half of its first block, and at its end.
        """
        plan, config = self._plan, self._plan.config
        live = plan.schedule.peak_live_activations[stage] / plan.schedule.num_chunks
        stream = activations.of_stream(config, plan.tokens)
        kept = self._kept()
        if LAST in self._units:
            kept += activations.of_head(config, plan.tokens)
        # Of messages two wait, and one is in hand; with it two more of its size are computed.
        kept = live * kept + 5 * stream
        hidden = activations.in_gradient_of_hidden(config) * activations.of_hidden(
            config, plan.tokens
        )
        # The gradient of the values, by head and in order, beside two of the scores.
        scores = activations.in_gradient_of_attention(config, plan.tokens)
        scores += activations.of_key_value(config, plan.tokens)
        sums = self._gradient_bytes()
        # The sum of what both ends of the model have of a common table.
        tied = [w for w in self._weights if {FIRST, LAST} <= set(w.units)]
        common = WIDE * total(tied, lambda w: w.slice_elements(self._mesh))
        sent = self._gathered(0) + common
        made = [
            (hidden, self._made_before_first_block(("down",))),
            (scores, self._made_before_first_block(("down", "up", "output/"))),
            (0, sums),
        ]
        if LAST in self._units:
            narrow = 0 if plan.compute_bytes == WIDE else plan.compute_bytes / WIDE
            logits = activations.of_logits(config, plan.tokens) * (1 + narrow)
            made.append((logits, self._table_gradient()))
        return [
            {"activations": kept + more, "gradients": sums + gradients, "communication": sent}
            for more, gradients in made
        ]

    # --- parts of them ----------------------------------------------------------------------------

    def _kept(self) -> float:
        """Activations that the stage's blocks keep, and their input."""
        config, tokens = self._plan.config, self._plan.tokens
        if self._plan.remat == "block":
            return (self._num_blocks + 1) * activations.of_stream(config, tokens)
        # What comes in; what goes out is kept by who gets it.
        ends = 1 if LAST in self._units else 0
        return self._num_blocks * activations.of_block(
            config, tokens
        ) + ends * activations.of_stream(config, tokens)

    def _made_before_first_block(self, kernels: tuple[str, ...]) -> float:
        """Gradients of all that comes after the stage's first block, and of some of its kernels."""
        first = min((unit for unit in self._units if isinstance(unit, int)), default=None)
        done = [
            w
            for w in self._weights
            if w.units[0] not in (FIRST, first)
            or (w.units[0] == first and any(name in w.name for name in kernels))
            or (LAST in w.units and LAST in self._units)
        ]
        return WIDE * total(done, lambda w: w.slice_elements(self._mesh))

    def _table_gradient(self) -> float:
        """The gradient of the table of the last product."""
        tables = [w for w in self._weights if LAST in w.units and w.is_kernel]
        return WIDE * total(tables, lambda w: w.slice_elements(self._mesh))

    def _gradient_bytes(self) -> float:
        return WIDE * total(self._weights, lambda w: w.slice_elements(self._mesh))

    def _gathered(self, blocks: int, done: Sequence[Weight] = ()) -> float:
        """Weights that fsdp has gathered; those in 16 bits are copies."""
        if self._mesh.axis_size("fsdp") == 1 or self._plan.compute_bytes != WIDE:
            return 0
        return WIDE * self._kernel_elements(blocks, done)

    def _copies(self, blocks: int, done: Sequence[Weight] = ()) -> float:
        """Weights in 16 bits."""
        if self._plan.compute_bytes == WIDE:
            return 0
        return self._plan.compute_bytes * self._kernel_elements(blocks, done)

    def _kernel_elements(self, blocks: int, done: Sequence[Weight]) -> float:
        """Of the kernels that are there.

        Where blocks let go of theirs, these are what is outside and of so many blocks, without
        those that are done with.
        """

        def elements(weights):
            return total(weights, lambda w: w.slice_elements(self._mesh))

        used = [w for w in self._weights if w.is_kernel and w.units != (FIRST,)]
        # A single block is not known to be one.
        if not self._plan.reshard_after_forward or self._num_blocks == 1:
            return elements(used)
        outside = elements([w for w in used if LAST in w.units])
        share = min(blocks, self._num_blocks) / self._num_blocks
        return (
            outside
            + share * (elements(used) - outside)
            - elements([w for w in done if w.is_kernel])
        )

    def _copies_of_host(self, blocks: int) -> float:
        """Weights of the host that so many first blocks need for their backward pass.

        With one more than there are, the last product is among them. Gathered, or in 16 bits,
        weights are needed in another form.
        """
        plan, mesh = self._plan, self._mesh
        is_used = mesh.axis_size("fsdp") == 1 and plan.compute_bytes == WIDE
        if not is_used or "parameters" not in plan.offload:
            return 0
        ends = [LAST] if blocks > plan.config.num_layers else []
        needed = [
            w for w in self._weights if w.is_kernel and w.units[-1] in (*range(blocks), *ends)
        ]
        return WIDE * total(needed, lambda w: w.slice_elements(mesh))

    def _update_axes(self) -> tuple[str, ...]:
        """Axes along which optimizer state is cut, once flattened."""
        return ("fsdp", "data") if self._plan.zero_stage in (1, 2) else ("fsdp",)

    def _updated_elements(self) -> int:
        """Elements of which this rank keeps the optimizer's state."""
        return total(self._weights, lambda w: w.part_elements(self._mesh, self._update_axes()))


def _units_by_stage(plan: Plan) -> list[list[str | int]]:
    units = [FIRST, *range(plan.config.num_layers), LAST]
    if plan.schedule is None:
        return [units]
    return stages_of_units(units, [_work(plan, unit) for unit in units], plan.schedule)


def _work(plan: Plan, unit: str | int) -> float:
    """Operations of a unit for one row, as the pipeline counts them to cut a model."""
    config, row = plan.config, replace(plan.tokens, rows=1)
    positions, width = row.positions, config.hidden_size
    kernels = total(
        [w for w in plan.weights if w.is_kernel and w.units[-1] == unit],
        lambda w: w.slice_elements(plan.mesh),
    )
    if unit == FIRST:
        return PER_ELEMENT * 3 * positions * width
    if unit == LAST:
        elements = 2 * positions * config.vocab_size / row.tensor + 6 * positions * width
        if row.tensor > 1:
            # The model by itself gathers its logits: laid in order, gathered, laid back and cut.
            elements += 4 * positions * config.vocab_size
        return 2 * positions * kernels + PER_ELEMENT * elements
    scores = positions**2 * config.num_heads / row.tensor
    hidden = activations.of_hidden(config, row) / row.compute_bytes
    # Of tensors as wide as the stream, as the hidden layer and as the scores, so many are made.
    elements = 41 * positions * width + 13 * hidden + 3 * scores + kernels
    if isinstance(config, MixtralConfig):
        kernels *= config.num_experts_per_token / config.num_experts
    products = 2 * positions * kernels + 4 * scores * config.head_dim
    return products + PER_ELEMENT * elements
