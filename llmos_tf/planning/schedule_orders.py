"""In which order a stage takes its passes, in each of the published pipeline schedules.

An order is a list of *turns* (kind, chunk); kinds are "F" forward, "B" backward, "W" gradient of
weights. Each turn takes the next microbatch of its kind and chunk. When it happens is not said
here: an op runs as soon as its inputs are there.
"""

from collections.abc import Callable
from itertools import zip_longest

# (kind, chunk)
Turn = tuple[str, int]


def _gpipe(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> list[Turn]:
    """All forward, then all backward."""
    return [("F", 0)] * num_microbatches + [("B", 0)] * num_microbatches


def _1f1b(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> list[Turn]:
    """After a warm-up one forward, one backward; with several chunks, groups of p take turns.

    A group of p microbatches goes through all chunks of a stage before the next group starts.
    """
    total = num_microbatches * num_chunks
    chunks = [i // num_stages % num_chunks for i in range(total)]
    forward = [("F", chunk) for chunk in chunks]
    backward = [("B", num_chunks - 1 - chunk) for chunk in chunks]
    warm_up = num_stages - stage - 1
    if num_chunks > 1:
        # Twice the distance to the last stage. Once would hold fewer activations with the same
        # bubble, but each transfer would be waited for; so there is a pass to do meanwhile.
        warm_up = min(2 * warm_up + (num_chunks - 1) * num_stages, total)
    pairs = zip_longest(forward[warm_up:], backward)
    return forward[:warm_up] + [turn for pair in pairs for turn in pair if turn]


def _zb_h1(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> list[Turn]:
    """1F1B, with W so late that gradients go up at once, and each stage holds what stage 0 does."""
    steady = num_microbatches - min(num_stages - stage - 1, num_microbatches)
    turns = [("F", 0)] * (num_microbatches - steady)
    for microbatch in range(num_microbatches):
        turns += [("F", 0)] * (microbatch < steady)
        turns += [("B", 0)]
        turns += [("W", 0)] * (microbatch >= stage)
    return turns + [("W", 0)] * min(stage, num_microbatches)


def _zb_v(num_stages: int, stage: int, num_microbatches: int, num_chunks: int) -> list[Turn]:
    """A warm-up fills the way down and up again, then F, B and W of both chunks take turns.

    The last W of a stage are kept for the end, when it would wait for gradients from below. With
    fewer than 2p - 1 microbatches it is the order of 2p - 1, without those that are not there.
    """
    below = num_stages - stage
    steady = max(num_microbatches, 2 * num_stages - 1) - num_stages
    turns = [("F", 0)] * (2 * below - 1)
    turns += [("F", 1), ("F", 0)] * stage
    turns += [("F", 1), ("B", 1), ("W", 1)] * below
    for index in range(steady):
        # The warm-up took F of chunk 0 this much further than F of chunk 1.
        turns += [("F", 0)] * (index < steady - below + 1)
        turns += [("B", 0), ("W", 0), ("F", 1), ("B", 1), ("W", 1)]
    turns += [("B", 0), ("B", 1)] * stage
    turns += [("B", 0), ("W", 0)] * below
    return turns + [("W", 1)] * stage + [("W", 0)] * stage


# Name -> function of (stages, stage, microbatches, chunks): the turns of that stage.
ORDERS: dict[str, Callable[[int, int, int, int], list[Turn]]] = {
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "interleaved": _1f1b,
    "zb-h1": _zb_h1,
    "zb-v": _zb_v,
}
