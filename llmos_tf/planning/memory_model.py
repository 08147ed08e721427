"""What a model and a step of it take on each device, by closed formulas. No TensorFlow.

Weights and optimizer state follow ZeRO (arXiv 1910.02054) to the byte, padding included. Within the
step the fullest moment is one of four, since between them memory grows or shrinks block by block:

- *turn*: the forward pass is through: all that is kept, with logits and the slope of the loss;
- *head*: the gradients of the last product are made of the slope;
- *last block*: the logits are gone, and either half of the last block is differentiated;
- *end*: all gradients are there, and are laid into buckets for their reduction.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from llmos_tf.config import GPTConfig, MixtralConfig
from llmos_tf.planning import activations
from llmos_tf.planning.activations import WIDE
from llmos_tf.planning.plan import Plan
from llmos_tf.planning.recomputation import while_recomputed
from llmos_tf.planning.stage_contents import StageContents
from llmos_tf.planning.stages import PER_ELEMENT, stages_of_units
from llmos_tf.planning.weights import FIRST, LAST, total

# What a device holds, by kind; `HOST` lies in the memory of its host.
HOST = "host"
KINDS = ("parameters", "gradients", "optimizer", "activations", "communication", "other")
# As in `strategies.optimizer.fused_update` and `fusion`.
GROUP_BYTES = 4 * 2**20
MIN_ELEMENTS = 2**15


def memory_of(plan: Plan) -> list[dict[str, int]]:
    """Returns what each stage's devices hold at the fullest moment of a step.

    Args:
        plan: the run.

    Returns:
        For each stage of the pipeline, or the only one, bytes by kind, `KINDS`, and on its `HOST`.
    """
    return [
        _Moments(plan, units).memory(stage) for stage, units in enumerate(_units_by_stage(plan))
    ]


class _Moments:
    """The moments of a step of which one is the fullest, on the devices of a stage."""

    def __init__(self, plan: Plan, units: Sequence[str | int]):
        self._plan, self._mesh = plan, plan.mesh
        self._contents = StageContents(plan, units)

    def memory(self, stage: int) -> dict[str, int]:
        plan = self._plan
        within = max(self._moments(stage), key=lambda moment: sum(moment.values()))
        slots = plan.optimizer_slots * WIDE * self._contents.updated_elements()
        whole = {
            "parameters": WIDE
            * total(self._contents.weights, lambda w: w.part_elements(self._mesh)),
            "optimizer": slots + plan.optimizer_scalars,
            "other": self._contents.copies(0) + within.get("other", 0.0),
        }
        offloaded = {kind: whole.pop(kind) for kind in plan.offload}
        memory = {kind: round(whole.get(kind, within.get(kind, 0))) for kind in KINDS}
        return {**memory, HOST: sum(offloaded.values())}

    # --- moments ----------------------------------------------------------------------------------

    def _moments(self, stage: int) -> list[dict[str, float]]:
        if self._plan.schedule is not None:
            return self._in_pipeline(stage)
        rest = self._last_block() if self._plan.rematerialise == "none" else self._recomputed()
        passes = [*self._turn(), *rest]
        early = WIDE * self._plan.early_values * self._contents.updated_elements()
        if early:
            passes = [{**m, "other": early + m.get("other", 0)} for m in passes]
        passes += self._buckets()
        if "parameters" in self._plan.offload:
            copies = self._contents.copies_of_host(self._plan.config.num_layers + 1)
            passes = [{"other": copies, **moment} for moment in passes]
        return [*passes, *self._update()]

    def _turn(self) -> list[dict[str, float]]:
        """With the logits and their slope; and with the slope and the last product's gradients."""
        config, tokens = self._plan.config, self._plan.tokens
        logits, stream = (
            activations.of_logits(config, tokens),
            activations.of_stream(config, tokens),
        )
        kept = self._contents.kept() + activations.of_head(config, tokens)
        # In 16 bits the gradient of whole logits is there before they are gone.
        narrow = 0.0 if tokens.compute_bytes == WIDE else tokens.compute_bytes / WIDE * logits
        cast = narrow if tokens.tensor == 1 else 0.0
        sent = self._contents.gathered(0)
        table = self._contents.table_gradient()
        if self._mesh.axis_size("fsdp") > 1:
            # It is of what was gathered in 16 bits.
            table *= tokens.compute_bytes / WIDE
        return [
            {"activations": kept + logits + cast, "communication": sent},
            {
                "activations": kept + stream,
                "gradients": table,
                "communication": sent,
            },
        ]

    def _last_block(self) -> list[dict[str, float]]:
        config, tokens = self._plan.config, self._plan.tokens
        stream = activations.of_stream(config, tokens)
        own = [w for w in self._contents.weights if w.units[-1] in (LAST, config.num_layers - 1)]
        kernels = ("down/kernel", "experts/down")
        # A gate's two gradients are laid together.
        is_gpt = isinstance(config, GPTConfig)
        moments = []
        for temporary, names in (
            (stream + (1 if is_gpt else 2) * activations.of_hidden(config, tokens), kernels),
            (
                # What the other half kept is gone, with its norm's result.
                activations.in_gradient_of_attention(config, tokens)
                - activations.of_multiplied_scores(config, tokens)
                - activations.of_feed_forward(config, tokens)
                - stream,
                (*kernels, "up/kernel", "experts/up", "output/kernel"),
            ),
        ):
            made = [w for w in own if LAST in w.units or w.name in names]
            moments.append(
                {
                    "activations": self._contents.kept() + temporary,
                    "gradients": WIDE * total(made, lambda w: w.slice_elements(self._mesh)),
                    # Where blocks let go: of the last one and the one before it, again.
                    "communication": self._contents.gathered(2, made),
                    "other": self._contents.copies(2, made) - self._contents.copies(0),
                }
            )
        return moments

    def _recomputed(self) -> list[dict[str, float]]:
        """While a block is computed again: the last one, or the first one, after all others."""
        config, tokens = self._plan.config, self._plan.tokens
        halves = while_recomputed(config, tokens, self._plan.rematerialise)
        all_kept = self._contents.kept_of_blocks(self._contents.num_blocks)
        first_kept = self._contents.kept_of_blocks(1)
        blocks = config.num_layers
        head = [w for w in self._contents.weights if LAST in w.units]
        own = [w for w in self._contents.weights if w.units[-1] == blocks - 1]
        moments = []
        for bytes_now, kernels in zip(halves, self._done_in_halves(), strict=True):
            first = self._contents.made_before_first_block(kernels) - self._contents.updated_early()
            made = [*head, *(w for w in own if any(name in w.name for name in kernels))]
            last = WIDE * total(made, lambda w: w.slice_elements(self._mesh))
            for activated, gradients, unfinished in (
                (all_kept + bytes_now, last, blocks),
                # The block after is not quite through.
                (first_kept + bytes_now + activations.of_stream(config, tokens), first, 1),
            ):
                copies = self._contents.copies(1, head) - self._contents.copies(0)
                moments.append(
                    {
                        "activations": activated,
                        "gradients": gradients,
                        "communication": self._contents.gathered(1, head),
                        "other": self._contents.copies_of_host(unfinished) + copies,
                    }
                )
        return moments

    def _done_in_halves(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The kernels of a block whose gradients are there while either half is differentiated."""
        early = () if self._plan.rematerialise == "selective" else ("down",)
        return early, ("down", "up", "output/")

    def _buckets(self) -> list[dict[str, float]]:
        """When a bucket of gradients is full, and they are laid together."""
        plan, mesh = self._plan, self._mesh
        if mesh.axis_size("fsdp") > 1:
            return self._scattered_by_gathers()
        scatters = plan.zero_stage in (1, 2)
        moments = []
        before = 0
        # Of a tied table, what the last product gives waits for what the lookups do.
        tied = [w for w in self._contents.weights if {FIRST, LAST} <= set(w.units)]
        waiting = WIDE * total(tied, lambda w: w.slice_elements(mesh))
        stream = activations.of_stream(plan.config, plan.tokens)
        buckets = self._contents.full_buckets()
        for bucket, following in itertools.zip_longest(buckets, buckets[1:]):
            size, kept = bucket.size, self._contents.kept_before(bucket.weights[-1])
            if bucket.unit != FIRST:
                # The backward pass goes on meanwhile: with the stream's gradient and a branch's,
                # and with the product that comes next.
                kept += 3 * stream
                size += waiting + (WIDE * following.next_product(mesh) if following else 0)
            now = {
                "activations": kept,
                "other": self._contents.copies_of_host(self._blocks_before(bucket.unit)),
            }
            for table in bucket.weights if bucket.unit == FIRST else ():
                # What lookups give is added to what the last product gives.
                both = (2 if LAST in table.units else 1) * WIDE * table.slice_elements(mesh)
                moments.append({**now, "gradients": both + before})
            # Several are laid end to end, or in a row for each rank. Their sum takes that memory;
            # what an exchange gives has its own.
            if scatters:
                moments.append({**now, "gradients": size + bucket.copied})
            sent = bucket.size if scatters else bucket.copied
            moments.append({**now, "gradients": size, "communication": sent})
            before = bucket.size
        return moments

    def _scattered_by_gathers(self) -> list[dict[str, float]]:
        """When a gradient is cut into what each rank gets, these are in a row, and then their sum.

        That of a table comes at the end, with nothing else.
        """
        mesh = self._mesh

        def largest(weights):
            return WIDE * max((w.slice_elements(mesh) for w in weights), default=0)

        tables = [w for w in self._contents.weights if w.units[0] == FIRST]
        others = [w for w in self._contents.weights if w.units[0] != FIRST]
        return [
            {
                "gradients": (2 + 1 / mesh.axis_size("fsdp")) * largest(tables),
                "other": -self._contents.copies(0),
            },
            {"gradients": 2 * largest(others), "communication": self._contents.gathered(0)},
        ]

    def _blocks_before(self, unit: str | int) -> int:
        return {FIRST: 0, LAST: self._contents.num_blocks}.get(unit, unit)

    def _update(self) -> list[dict[str, float]]:
        """When the optimizer is at work."""
        plan, updated = self._plan, WIDE * self._contents.updated_elements()
        if plan.offload and plan.optimizer_slots:
            return self._update_beside_host()
        if plan.update == "keras":
            # What is added to each moment is computed when its gradient is there, for all at once.
            return [{"gradients": 2 * updated}]
        sizes = [
            WIDE * w.part_elements(self._mesh, self._contents.update_axes())
            for w in self._contents.weights
        ]
        small = sum(size for size in sizes if size < WIDE * MIN_ELEMENTS)
        # Of one group after another weights and moments, the gradients, and what they change; or
        # all that has been decayed.
        group = min(GROUP_BYTES, small)
        decayed = small if plan.decays else 0
        scatters = plan.zero_stage in (1, 2)
        full = self._contents.full_buckets() if scatters else []
        gathered = max((bucket.size for bucket in full), default=0)
        # Of large weights, until they are gathered.
        new_parts = sum(sizes) - small if scatters else 0
        apart = max((bucket.copied for bucket in full), default=0)
        return [
            # New parts, and of one bucket after another the weights, gathered and each by itself.
            {"gradients": updated, "communication": gathered} if scatters else {},
            {"gradients": updated + apart, "communication": apart} if scatters else {},
            # Each large weight when its gradient is there; that of a table in two parts, which are
            # summed.
            {"gradients": 2 * max(sizes)},
            {
                "gradients": small + (1 if decayed else 2) * group + new_parts,
                "other": (1 + plan.optimizer_slots) * group + decayed,
                "communication": gathered,
            },
        ]

    def _update_beside_host(self) -> list[dict[str, float]]:
        """When a group is changed whose state, or whose weights, are on the host."""
        updated = WIDE * self._contents.updated_elements()
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
        kept = self._contents.kept()
        if LAST in self._contents.units:
            kept += activations.of_head(config, plan.tokens)
        # Of messages two wait, and one is in hand; with it two more of its size are computed, of
        # which one is counted where a block is computed again.
        is_recomputed = plan.rematerialise != "none"
        kept = live * kept + (4 if is_recomputed else 5) * stream
        hidden = activations.in_gradient_of_hidden(config) * activations.of_hidden(
            config, plan.tokens
        )
        # The gradient of the values, by head and in order, beside two of the scores.
        scores = activations.in_gradient_of_attention(config, plan.tokens)
        scores += activations.of_key_value(config, plan.tokens)
        sums = self._contents.gradient_bytes()
        # The sum of what both ends of the model have of a common table.
        tied = [w for w in self._contents.weights if {FIRST, LAST} <= set(w.units)]
        common = WIDE * total(tied, lambda w: w.slice_elements(self._mesh))
        sent = self._contents.gathered(0) + common
        if is_recomputed:
            hidden, scores = while_recomputed(config, plan.tokens, plan.rematerialise)
        made = []
        for more, done in zip((hidden, scores), self._done_in_halves(), strict=True):
            copies = self._contents.copies_of_first_block(done)
            made.append((more, self._contents.made_before_first_block(done), copies))
        # In 16 bits the gradient of a table is there in these too.
        narrow = 0 if plan.compute_bytes == WIDE else plan.compute_bytes / WIDE
        tables = [w for w in self._contents.weights if w.units[0] == FIRST and w.is_kernel]
        lookups = narrow * WIDE * total(tables, lambda w: w.slice_elements(self._mesh))
        made.append((0, sums + lookups, 0))
        if LAST in self._contents.units:
            logits = activations.of_logits(config, plan.tokens) * (1 + narrow)
            table = 0 if narrow else self._contents.table_gradient()
            made.append((logits, table, self._contents.copies(0)))
        return [
            {
                "activations": kept + more,
                "gradients": sums + gradients,
                "communication": sent,
                "other": copies - self._contents.copies(0),
            }
            for more, gradients, copies in made
        ]


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
