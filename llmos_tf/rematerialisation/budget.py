"""The cheapest way to compute blocks again within a number of bytes. Plain numbers only."""

from collections.abc import Sequence
from typing import NamedTuple

# So many partial choices are compared at most, where blocks are all different.
MAX_FRONT = 4096


class Way(NamedTuple):
    """One way to run a block.

    Attributes:
        bytes: that it keeps for the backward pass.
        cost: of what it computes again.
    """

    bytes: int
    cost: float


class _Partial(NamedTuple):
    """A choice for the first blocks."""

    bytes: int
    cost: float
    ways: tuple[int, ...]


def cheapest_within(blocks: Sequence[Sequence[Way]], budget: int) -> tuple[int, ...]:
    """Chooses a way for each block, such that they fit together and cost least.

    Exactly, by dynamic programming over the blocks: of the choices for the first ones those stay
    that no other undercuts in bytes without costing more. Blocks that are alike leave few. Where
    more than `MAX_FRONT` stay, as many of them do, and what fits is found, but maybe not the
    cheapest.

    Args:
        blocks: of each block the ways to run it, one at least.
        budget: bytes that all blocks may keep together.

    Returns:
        Of each block the place of its way.

    Raises:
        ValueError: nothing fits.

    Example:
        >>> keeps, runs_twice = Way(100, 0.0), Way(10, 5.0)
        >>> cheapest_within([[keeps, runs_twice]] * 3, budget=220)
        (1, 0, 0)
    """
    least = least_bytes(blocks)
    if least > budget:
        raise ValueError(
            f"{len(blocks)} blocks keep {least} bytes at least, where as much as possible is "
            f"computed again. Received: a budget of {budget} bytes."
        )
    front = [_Partial(0, 0.0, ())]
    for number, ways in enumerate(blocks):
        # What the blocks to come need in any case.
        room = budget - least_bytes(blocks[number + 1 :])
        longer = [
            _Partial(before.bytes + way.bytes, before.cost + way.cost, (*before.ways, i))
            for before in front
            for i, way in enumerate(ways)
            if before.bytes + way.bytes <= room
        ]
        front = _thinned(_undercut_by_none(longer))
    return front[-1].ways


def least_bytes(blocks: Sequence[Sequence[Way]]) -> int:
    """Returns the fewest bytes that blocks can keep together.

    Args:
        blocks: as of `cheapest_within`.

    Returns:
        Bytes.
    """
    return sum(min(way.bytes for way in ways) for ways in blocks)


def _undercut_by_none(choices: Sequence[_Partial]) -> list[_Partial]:
    """By ascending bytes and descending cost."""

    def order(choice):
        # Of equal ones that which computes the first blocks again: when the backward pass comes to
        # them, the others keep nothing any more.
        return choice.bytes, choice.cost, tuple(-way for way in choice.ways)

    front: list[_Partial] = []
    for choice in sorted(choices, key=order):
        if not front or choice.cost < front[-1].cost:
            front.append(choice)
    return front


def _thinned(front: list[_Partial]) -> list[_Partial]:
    """Every so many, the smallest and the cheapest among them."""
    if len(front) <= MAX_FRONT:
        return front
    step = -(-len(front) // (MAX_FRONT - 1))
    return [*front[:-1:step], front[-1]]
