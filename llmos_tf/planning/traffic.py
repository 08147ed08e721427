"""What a step sends, by closed formulas. No TensorFlow.

The formulas follow from the architecture and the layouts alone; `llmos_tf.collectives.traffic`
counts the same in the traced step. Letters: N ranks of a group, S bytes of a whole tensor; B rows
and L positions that a rank has of a microbatch, D hidden width, t size of the axis `tensor`, p
ranks over which positions are split.
"""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from llmos_tf.config import MixtralConfig
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.planning.training_step import TrainingStep
from llmos_tf.planning.weights import FIRST, LAST, Weight, weights_of

# Whatever is smaller, in bytes, is no row of its own: losses, norms, counts.
_SMALL = 1024
# An exchange of rows with experts is filled up to one of so many lengths.
_NUM_LENGTHS = 64
_INT = 4


class Sent(NamedTuple):
    """One collective.

    Args:
        axes: along which the group extends.
        kind: as in `wire_bytes`.
        size: S, bytes of the whole tensor.
        times: in a step.
        is_row: whether it is in a row of its kind, however small: what gathers and scatters
            numbers, and sums gradients.
    """

    axes: tuple[str, ...]
    kind: str
    size: int
    times: int = 1
    is_row: bool = False


def wire_bytes(kind: str, ranks: int, size: int) -> Fraction:
    """Returns what each rank sends by one collective.

    Args:
        kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute" or "send".
        ranks: N, in the group.
        size: S, bytes of the whole tensor.

    Returns:
        Bytes: 2(N-1)/N · S, (N-1)/N · S for the three that gather or scatter, S for the last two.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> wire_bytes("all_reduce", 4, 1000)
        Fraction(1500, 1)
    """
    share = Fraction(ranks - 1, ranks)
    shares = {
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "all_to_all": share,
        "permute": Fraction(1),
        "send": Fraction(1),
    }
    if kind not in shares:
        raise ValueError(f"The kinds are {', '.join(shares)}. Received: {kind!r}.")
    return shares[kind] * size


def step_traffic(step: TrainingStep, stage: int | None = None) -> list[dict[str, Any]]:
    """Returns what a rank sends in a training step, along each axis.

    An optimizer that updates element by element is supposed (SGD, Adam, AdamW, …), without
    rematerialisation, and experts that are equally busy. What is smaller than 1 KiB (losses, norms,
    counts) is left out.

    Args:
        step: the step.
        stage: of a pipeline; None for the one that sends most.

    Returns:
        A dict for each axis and kind: `axis`, `kind`, `bytes`; the same rows as of
        `llmos_tf.collectives.traffic`, without those of kind "scalars".

    Example:
        >>> step_traffic(TrainingStep(config=config, mesh=Mesh(data=4), global_batch=8,
        ...                           sequence_length=64))
        [{'axis': 'data', 'kind': 'all_reduce', 'bytes': 435456}]

    Reference:
        Thakur et al., Optimization of collective communication operations in MPICH (2005); ZeRO
        (arXiv 1910.02054), section 7; Megatron-LM (arXiv 1909.08053, 2205.05198); ring attention
        (arXiv 2310.01889); Ulysses (arXiv 2309.14509); GShard (arXiv 2006.16668).
    """
    if stage is None:
        rows = [step_traffic(step, stage) for stage in range(step.size("pipe"))]
        return max(rows, key=lambda found: sum(row["bytes"] for row in found))
    sums: dict[tuple[str, str], Fraction] = {}
    for sent in [*_weights(step, stage), *_activations(step, stage), *_messages(step, stage)]:
        axes = tuple(a for a in step.mesh.canonical_axes(sent.axes) if step.size(a) > 1)
        if not axes or (sent.size < _SMALL and not sent.is_row):
            continue
        key = "+".join(axes), sent.kind
        wire = sent.times * wire_bytes(sent.kind, step.size(axes), sent.size)
        sums[key] = sums.get(key, Fraction(0)) + wire
    return [
        {"axis": axis, "kind": kind, "bytes": round(wire)}
        for (axis, kind), wire in sorted(sums.items())
    ]


def _weights(step: TrainingStep, stage: int) -> Iterator[Sent]:
    """Weights that are gathered, and the sums of gradients."""
    is_first, is_last = stage == step.stage_of_part[0], stage == step.stage_of_part[-1]
    # All blocks are alike.
    times = {FIRST: is_first, LAST: is_last, 0: step.blocks_on(stage)}
    for weight in weights_of(step.config, step.mesh):
        # A tied table is gathered once, for tokens and logits.
        count = max(times.get(unit, 0) for unit in weight.units)
        if count:
            for sent in _weight(step, weight):
                yield sent._replace(times=sent.times * count)
        if {FIRST, LAST} <= set(weight.units) and is_first != is_last:
            # The two stages that hold it add each other's gradient.
            yield Sent(("pipe",), "send", step.weight_bytes * _part(step, weight))


def _weight(step: TrainingStep, weight: Weight) -> Iterator[Sent]:
    """Along `fsdp`, then along `data` and the axes on which ranks have parts of a gradient."""
    fsdp, data = step.size("fsdp"), step.size("data")
    part, element = _part(step, weight), step.weight_bytes
    if fsdp > 1:
        # Of a single block it cannot be told that it is one; what is outside of blocks stays.
        is_of_blocks = 0 in weight.units and step.config.num_layers > 1
        gathers = 2 if step.reshard_after_forward and is_of_blocks else 1
        yield Sent(("fsdp",), "all_gather", fsdp * part * element, gathers, True)
        yield Sent(("fsdp",), "reduce_scatter", fsdp * part * element, 1, True)
    partial = set(step.stream_axes) - set(weight.axes)
    if weight.is_shared_by_heads or (weight.is_in_stream and step.sequence_parallel):
        partial.add("tensor")
    if step.zero_stage in (1, 2) and data > 1:
        shard = -(-part // data)
        yield Sent(("data",), "reduce_scatter", data * shard * element, 1, True)
        yield Sent(("data",), "all_gather", data * shard * element, 1, True)
        yield Sent(tuple(partial), "all_reduce", shard * element, 1, True)
    else:
        yield from _summed(step, ("data", *partial), part * element, element)


def _summed(step: TrainingStep, axes: tuple[str, ...], size: int, element: int) -> Iterator[Sent]:
    """A sum of a gradient; along several axes each rank of the innermost takes its part outward."""
    split = [axis for axis in step.mesh.canonical_axes(axes) if step.size(axis) > 1]
    if len(split) < 2:
        yield Sent(axes, "all_reduce", size, 1, True)
        return
    *outer, inner = split
    part = -(-(size // element) // step.size(inner)) * element
    yield Sent((inner,), "reduce_scatter", part * step.size(inner), 1, True)
    yield Sent(tuple(outer), "all_reduce", part, 1, True)
    yield Sent((inner,), "all_gather", part * step.size(inner), 1, True)


def _part(step: TrainingStep, weight: Weight) -> int:
    """Elements of a weight that a rank stores."""
    return weight.part_elements(step.mesh)


def _messages(step: TrainingStep, stage: int) -> Iterator[Sent]:
    """Activations that cross the cuts of a pipeline forward, and gradients backward."""
    stages, split = step.stage_of_part, step.size("tensor") if step.sequence_parallel else 1
    positions = step.stream_length // split
    size = step.stream_rows * positions * step.config.hidden_size * step.activation_bytes
    for before, after in itertools.pairwise(stages):
        if before != after and stage in (before, after):
            yield Sent(("pipe",), "send", size, step.microbatches)


def _activations(step: TrainingStep, stage: int) -> Iterator[Sent]:
    """What forward and backward passes send within a stage."""
    sents = [(sent, step.blocks_on(stage)) for sent in _block(step)]
    if stage == step.stage_of_part[0]:
        # The embedding is a region that is only left.
        sents += [(sent, 1) for sent in _leave(step)]
    if stage == step.stage_of_part[-1]:
        sents += [(sent, 1) for sent in _head(step)]
    for sent, count in sents:
        yield sent._replace(times=sent.times * count * step.microbatches)
    if isinstance(step.config, MixtralConfig):
        # The load of each block's experts is averaged over the batch, once.
        noted = step.config.num_experts + (step.config.capacity_factor is not None)
        yield Sent(BATCH_AXES, "all_reduce", step.blocks_on(stage) * noted * step.weight_bytes)


def _block(step: TrainingStep) -> Iterator[Sent]:
    yield from [*_enter(step), *_leave(step), *_attention(step)]
    if isinstance(step.config, MixtralConfig):
        yield from _mixture(step, step.config)
    else:
        yield from [*_enter(step), *_leave(step)]


def _stream(step: TrainingStep) -> int:
    """Bytes of an activation [B, L, D]."""
    elements = step.stream_rows * step.stream_length * step.config.hidden_size
    return elements * step.activation_bytes


def _enter(step: TrainingStep, size: int | None = None) -> Iterator[Sent]:
    """Into a tensor-parallel region: f backward, or a gather forward and its adjoint backward."""
    size = _stream(step) if size is None else size
    if step.sequence_parallel:
        yield Sent(("tensor",), "all_gather", size, is_row=True)
        yield Sent(("tensor",), "reduce_scatter", size, is_row=True)
    else:
        yield Sent(("tensor",), "all_reduce", size)


def _leave(step: TrainingStep) -> Iterator[Sent]:
    """Out of a region: g forward, or a reduce-scatter forward and a gather backward."""
    return _enter(step)


def _attention(step: TrainingStep) -> Iterator[Sent]:
    """Keys and values around the ring, or heads dealt out."""
    p, axes = step.size(step.position_axes), step.position_axes
    if p == 1:
        return
    queries, keys = _heads(step)
    head = step.stream_rows * step.stream_length * step.config.head_dim
    if step.context_method == "ring":
        both, element = 2 * keys * head, step.activation_bytes
        yield Sent(axes, "permute", both * element, 2 * (p - 1))
        # Gradients are summed in float32 at least, and go all the way round.
        yield Sent(axes, "permute", both * max(element, 4), p)
        return
    repeated = keys * (p // math.gcd(keys, p))
    for heads in (queries, 2 * repeated, queries):
        yield Sent(axes, "all_to_all", heads * head * step.activation_bytes, 2)


def _heads(step: TrainingStep) -> tuple[int, int]:
    """Query heads of a rank, and its key-value heads."""
    t, heads = step.size("tensor"), step.config.num_heads
    all_keys = getattr(step.config, "num_kv_heads", heads)
    if all_keys % t == 0:
        return heads // t, all_keys // t
    # Each group of its query heads that share one.
    return heads // t, heads // t // math.gcd(heads // t, heads // all_keys)


def _mixture(step: TrainingStep, config: MixtralConfig) -> Iterator[Sent]:
    """The tensor-parallel region of a mixture, the way to the experts and back, and its counts."""
    tokens, element = step.stream_rows * step.stream_length, step.activation_bytes
    choices = tokens * config.num_experts_per_token
    yield from [*_enter(step), *_leave(step), *_enter(step, choices * element)]
    if step.sequence_parallel:
        yield Sent(("tensor",), "all_gather", choices * _INT)
    token_axes = (*step.stream_axes, *(("tensor",) if step.sequence_parallel else ()))
    counts = (config.num_experts + 1) * _INT
    yield Sent((*BATCH_AXES, *token_axes), "all_reduce", counts)
    if config.capacity_factor is not None:
        if step.sequence_parallel:
            yield Sent(("tensor",), "all_gather", choices * _INT)
        yield Sent(step.position_axes, "all_gather", choices * step.size(step.position_axes) * _INT)
    ways = step.size("expert")
    if ways == 1:
        return
    if "expert" not in step.stream_axes:
        # All ranks have the same rows, and each the sum of its own experts.
        yield Sent(("expert",), "all_reduce", _stream(step), 2)
        yield Sent(("expert",), "all_reduce", choices * element)
        return
    yield Sent(("expert",), "all_gather", ways * config.num_experts * _INT)
    unit = max(1, choices // _NUM_LENGTHS)
    room = -(-choices // (ways * unit)) * unit
    yield Sent(("expert",), "all_to_all", ways * room * config.hidden_size * element, 4)


def _head(step: TrainingStep) -> Iterator[Sent]:
    """Into the output layer, and the loss of each token by the ranks' slices of the vocabulary."""
    yield from _enter(step)
    losses = step.stream_rows * step.stream_length * step.weight_bytes
    yield Sent(("tensor",), "all_reduce", losses)
    yield Sent(("tensor",), "all_reduce", 2 * losses)
    # First all positions of a row, then all rows.
    positions, rows = step.size(step.position_axes), step.size(step.row_axes)
    yield Sent(step.position_axes, "all_gather", losses * positions, is_row=True)
    yield Sent(step.row_axes, "all_gather", losses * positions * rows, is_row=True)
