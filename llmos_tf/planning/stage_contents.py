"""What the devices of a stage hold at one time or another, by closed formulas. No TensorFlow."""

from collections.abc import Sequence
from typing import NamedTuple

from llmos_tf.config import GPTConfig, MixtralConfig
from llmos_tf.mesh import Mesh
from llmos_tf.planning import activations
from llmos_tf.planning.activations import WIDE
from llmos_tf.planning.buckets import default_bucket_bytes, plan_buckets
from llmos_tf.planning.plan import Plan
from llmos_tf.planning.recomputation import kept_of_block
from llmos_tf.planning.weights import FIRST, LAST, Weight, total

# How names of weights begin that come after a block's attention.
_AFTER_ATTENTION = ("up/", "down/", "experts/", "router/", "feed_forward_norm/")


class FullBucket(NamedTuple):
    """Gradients that are reduced together.

    Args:
        weights: in the order in which their gradients are made.
        size: bytes of all.
    """

    weights: tuple[Weight, ...]
    size: int

    @property
    def copied(self) -> int:
        """Bytes of the buffer in which several are laid end to end."""
        return self.size if len(self.weights) > 1 else 0

    @property
    def unit(self) -> str | int:
        """Where the last of them is made."""
        return self.weights[-1].units[0]

    def next_product(self, mesh: Mesh) -> int:
        """Returns the elements of the first of its gradients that is of a product.

        Args:
            mesh: of the run.

        Returns:
            Elements of the slice that a rank computes with; 0 if there is none.
        """
        return next((w.slice_elements(mesh) for w in self.weights if w.is_kernel), 0)


class StageContents:
    """The devices that hold some units of a model: embeddings, blocks, last norm and logits.

    Args:
        plan: the run.
        units: of the stage, or all.
    """

    def __init__(self, plan: Plan, units: Sequence[str | int]):
        self._plan, self.units = plan, set(units)
        self._mesh = plan.mesh
        self.weights = [w for w in plan.weights if not self.units.isdisjoint(w.units)]
        blocks = [unit for unit in units if isinstance(unit, int)]
        self.num_blocks = len(blocks)
        self._first_block = min(blocks, default=None)

    def kept(self) -> float:
        """Activations that the stage's blocks keep, and their input.

        Returns:
            Bytes.
        """
        config, tokens = self._plan.config, self._plan.tokens
        # What comes in; what goes out is kept by who gets it.
        ends = 1 if LAST in self.units else 0
        return self.kept_of_blocks(self.num_blocks) + ends * activations.of_stream(config, tokens)

    def kept_of_blocks(self, count: int) -> float:
        """Activations that so many first blocks keep.

        Args:
            count: how many.

        Returns:
            Bytes.
        """
        config, tokens, option = self._plan.config, self._plan.tokens, self._plan.rematerialise
        # Positions are added by a layer, too, which keeps its input.
        before = option == "full" and FIRST in self.units and isinstance(config, GPTConfig)
        stream = activations.of_stream(config, tokens) if before else 0.0
        return count * kept_of_block(config, tokens, option) + stream

    def made_before_first_block(self, kernels: tuple[str, ...]) -> float:
        """Gradients of all that comes after the stage's first block, and of some of its kernels.

        Args:
            kernels: of the first block, parts of their names.

        Returns:
            Bytes.
        """
        done = [
            w
            for w in self.weights
            if w.units[0] not in (FIRST, self._first_block)
            or (w.units[0] == self._first_block and any(name in w.name for name in kernels))
            or (LAST in w.units and LAST in self.units)
        ]
        return WIDE * total(done, lambda w: w.slice_elements(self._mesh))

    def table_gradient(self) -> float:
        """The gradient of the table of the last product.

        Returns:
            Bytes.
        """
        tables = [w for w in self.weights if LAST in w.units and w.is_kernel]
        return WIDE * total(tables, lambda w: w.slice_elements(self._mesh))

    def gradient_bytes(self) -> float:
        """Gradients of all weights.

        Returns:
            Bytes.
        """
        return WIDE * total(self.weights, lambda w: w.slice_elements(self._mesh))

    def gathered(self, blocks: int, done: Sequence[Weight] = ()) -> float:
        """Weights that fsdp has gathered; those in 16 bits are copies.

        Args:
            blocks: of so many the weights are there, where blocks let go of theirs.
            done: weights that are done with.

        Returns:
            Bytes.
        """
        if self._mesh.axis_size("fsdp") == 1 or self._plan.compute_bytes != WIDE:
            return 0
        return WIDE * self._kernel_elements(blocks, done)

    def copies(self, blocks: int, done: Sequence[Weight] = ()) -> float:
        """Weights in 16 bits.

        Args:
            blocks: of so many the weights are there, where blocks let go of theirs.
            done: weights that are done with.

        Returns:
            Bytes.
        """
        if self._plan.compute_bytes == WIDE:
            return 0
        return self._plan.compute_bytes * self._kernel_elements(blocks, done)

    def copies_of_first_block(self, done: tuple[str, ...]) -> float:
        """Weights in 16 bits of the stage's first block, without kernels that are done with.

        Args:
            done: parts of their names.

        Returns:
            Bytes.
        """
        if self._plan.compute_bytes == WIDE:
            return 0
        used = [w for w in self.weights if w.is_kernel and w.units[0] == self._first_block]
        left = [w for w in used if not any(name in w.name for name in done)]
        return self._plan.compute_bytes * total(left, lambda w: w.slice_elements(self._mesh))

    def _kernel_elements(self, blocks: int, done: Sequence[Weight]) -> float:
        """Of the kernels that are there.

        Where blocks let go of theirs, these are what is outside and of so many blocks, without
        those that are done with.
        """

        def elements(weights):
            return total(weights, lambda w: w.slice_elements(self._mesh))

        used = [w for w in self.weights if w.is_kernel and w.units != (FIRST,)]
        # A single block is not known to be one.
        lets_go = self._plan.reshard_after_forward and self.num_blocks > 1
        if not lets_go and self._plan.rematerialise == "none":
            return elements(used)
        outside = elements([w for w in used if LAST in w.units])
        share = min(blocks, self.num_blocks) / self.num_blocks
        return (
            outside
            + share * (elements(used) - outside)
            - elements([w for w in done if w.is_kernel])
        )

    def copies_of_host(self, blocks: int) -> float:
        """Weights of the host that so many first blocks need for their backward pass.

        With one more than there are, the last product is among them. Gathered, or in 16 bits,
        weights are needed in another form.

        Args:
            blocks: how many.

        Returns:
            Bytes.
        """
        plan, mesh = self._plan, self._mesh
        is_used = mesh.axis_size("fsdp") == 1 and plan.compute_bytes == WIDE
        if not is_used or "parameters" not in plan.offload:
            return 0
        ends = [LAST] if blocks > plan.config.num_layers else []
        needed = [w for w in self.weights if w.is_kernel and w.units[-1] in (*range(blocks), *ends)]
        return WIDE * total(needed, lambda w: w.slice_elements(mesh))

    def update_axes(self) -> tuple[str, ...]:
        """Axes along which optimizer state is cut, once flattened.

        Returns:
            Names.
        """
        return ("fsdp", "data") if self._plan.zero_stage in (1, 2) else ("fsdp",)

    def updated_elements(self) -> int:
        """Elements of which this rank keeps the optimizer's state.

        Returns:
            How many.
        """
        return total(self.weights, lambda w: w.part_elements(self._mesh, self.update_axes()))

    def full_buckets(self) -> list[FullBucket]:
        """Buckets of gradients.

        Returns:
            Those of all gradients that are reduced, in the order of the backward pass.
        """
        # What is used last comes first.
        units = [LAST, *range(self._plan.config.num_layers - 1, -1, -1), FIRST]
        weights = [w for u in units for w in reversed(self.weights) if w.units[0] == u]
        ways = {i: self._ways(w) for i, w in enumerate(weights) if self._ways(w) > 1}
        sizes = {i: WIDE * weights[i].slice_elements(self._mesh) for i in ways}
        limits = dict.fromkeys(ways.values(), self._plan.bucket_bytes)
        if self._plan.bucket_bytes is None:
            for ranks in limits:
                alike = sum(sizes[i] for i in ways if ways[i] == ranks)
                limits[ranks] = default_bucket_bytes(ranks, alike)
        buckets = plan_buckets(ways, sizes, {i: i for i in ways}, limits)
        return [
            FullBucket(
                tuple(weights[i] for i in bucket.members), sum(sizes[i] for i in bucket.members)
            )
            for bucket in buckets
        ]

    def kept_before(self, weight: Weight) -> float:
        """Activations that are kept when the gradient of a weight is made.

        Args:
            weight: of the stage.

        Returns:
            Bytes.
        """
        config, tokens, unit = self._plan.config, self._plan.tokens, weight.units[0]
        if unit == FIRST:
            return 0.0
        blocks = self.num_blocks if unit == LAST else unit
        if self._plan.rematerialise != "none":
            return self.kept_of_blocks(blocks)
        whole = activations.of_block(config, tokens)
        after = activations.of_feed_forward(config, tokens) + activations.of_stream(config, tokens)
        in_feed_forward = weight.name.startswith(_AFTER_ATTENTION)
        return blocks * whole + (whole - after if in_feed_forward else 0.0)

    def _ways(self, weight: Weight) -> int:
        """Ranks that split the work of which a weight's gradient is summed."""
        ways = self._mesh.axis_size(("data", "fsdp", "context"))
        is_cut = "expert" in weight.axes
        has_experts = isinstance(self._plan.config, MixtralConfig)
        return ways * (self._mesh.axis_size("expert") if has_experts and not is_cut else 1)

    def updated_early(self) -> float:
        """Gradients that are used up before the first block's are made.

        Returns:
            Bytes.
        """
        if self._plan.update == "keras":
            return 0.0
        full = [bucket.size for bucket in self.full_buckets() if bucket.unit not in (FIRST, 0)]
        alone = [w for w in self.weights if self._ways(w) == 1 and w.units[0] not in (FIRST, 0)]
        return sum(full) + WIDE * total(alone, lambda w: w.slice_elements(self._mesh))
