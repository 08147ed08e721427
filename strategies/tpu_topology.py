"""Where the ranks of a mesh lie on the chips of a TPU: boxes within boxes. numpy only.

A rank is a (replica, logical core) pair, as `tf.distribute.TPUStrategy` counts: the replica is its
index along `data` and `fsdp`, the logical core its index along `pipe`, `expert`, `context` and
`tensor`, in the order of `mesh.AXES`. The chips of a tensor group are a box of the topology, walked
so that the next rank is one hop away and, where the box allows it, the last one hop from the first.
The tensor groups of a context group are a box of such boxes, and so on outwards to a replica, and
the replicas fill the topology.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from llmos_tf.mesh import AXES, BATCH_AXES, Mesh

# The axes whose ranks are the logical cores of one replica.
CORE_AXES = tuple(axis for axis in AXES if axis not in BATCH_AXES)


def core_coordinates(
    mesh: Mesh, shape: Sequence[int], missing: Sequence[Sequence[int]] = ()
) -> np.ndarray:
    """Places the ranks of a mesh on the cores of a topology.

    Neighbours on `tensor` are always on one chip or one hop apart, unless cores are missing. No
    link from one end of the topology to the other is counted on: small slices have none. A mesh
    smaller than the topology leaves cores idle. Where boxes do not fit (a tensor axis of 3 in a
    topology of 2 by 2), ranks follow one snake through all chips, as they do around missing cores.

    Args:
        mesh: the axes; its devices are not looked at.
        shape: chips along x, y and z, and cores per chip.
        missing: coordinates that hold no working core.

    Returns:
        int32 of shape ``[data × fsdp, the other axes, 4]``: (x, y, z, core) of each logical core.

    Raises:
        ValueError: the mesh needs more cores than there are.

    Example:
        >>> core_coordinates(Mesh(data=2, tensor=4), (2, 2, 1, 2))[0].tolist()
        [[0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 1]]
    """  # noqa: DOC502
    shape = tuple(int(length) for length in shape)
    _check_size(mesh, shape, len(missing))
    sizes = tuple(mesh.axis_size(axis) for axis in (*reversed(CORE_AXES), BATCH_AXES))
    factors = None if len(missing) else _box_factors(sizes, shape, (1, 1, 1, 1))
    if factors is None:
        holes = {tuple(int(index) for index in core) for core in missing}
        walk = _with_cores(_snake(shape[:3]), shape[3])
        cores = np.array([core for core in walk.tolist() if tuple(core) not in holes])[: mesh.size]
    else:
        cores, box = np.zeros((1, 4), int), np.ones(4, int)
        for factor in factors:
            steps = _with_cores(_ring(factor[:3]), factor[3]) * box
            cores = (steps[:, None] + cores).reshape(-1, 4)
            box = box * factor
    return cores.reshape(mesh.batch_ways, -1, 4).astype(np.int32)


# Chips are rows of three integers, cores of four.


@functools.lru_cache(maxsize=1 << 16)
def _box_factors(
    sizes: tuple[int, ...], shape: tuple[int, ...], box: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """By how much each axis, innermost first, makes the box longer; None where nothing fits."""
    if not sizes:
        return ()
    room = tuple(length // side for length, side in zip(shape, box, strict=True))

    def preference(factor):
        # Both cores of a chip before a second chip, then rings, then compact boxes: short ways.
        grown = [side * times for side, times in zip(box, factor, strict=True)]
        straight = tuple(-times for times in factor)
        return -factor[3], not _closes(factor[:3]), sum(grown[:3]), straight

    for factor in sorted(_factorizations(sizes[0], room), key=preference):
        grown = tuple(side * times for side, times in zip(box, factor, strict=True))
        rest = _box_factors(sizes[1:], shape, grown)
        if rest is not None:
            return (factor, *rest)
    return None


def _factorizations(size: int, room: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ways to write `size` as a product of factors that are at most `room`."""
    if not room:
        return [()] if size == 1 else []
    return [
        (first, *rest)
        for first in range(1, min(size, room[0]) + 1)
        if size % first == 0
        for rest in _factorizations(size // first, room[1:])
    ]


def _closes(shape: tuple[int, ...]) -> bool:
    """Whether a box of chips has a walk through all of them that ends beside its start."""
    chips = math.prod(shape)
    return chips <= 2 or (chips % 2 == 0 and max(shape) < chips)


def _snake(shape: tuple[int, ...]) -> np.ndarray:
    """A walk through a box, each step to a neighbour: back and forth in each dimension."""
    walk = np.zeros((1, 0), int)
    for length in reversed(shape):
        turns = [walk[:: -1 if index % 2 else 1] for index in range(length)]
        walk = np.concatenate([np.insert(turn, 0, i, axis=1) for i, turn in enumerate(turns)])
    return walk


def _ring(shape: tuple[int, ...]) -> np.ndarray:
    """A snake that ends beside its start where the box has such a walk."""
    if math.prod(shape) <= 2 or not _closes(shape):
        return _snake(shape)
    # An even side gives the rows and a snake through the others the columns: back and forth
    # through all columns but the first, which is the way home.
    dim = next(dim for dim, side in enumerate(shape) if side % 2 == 0 and side < math.prod(shape))
    columns = _snake(shape[:dim] + shape[dim + 1 :])
    away = _snake((shape[dim], len(columns) - 1)) + np.array([0, 1])
    home = [(row, 0) for row in reversed(range(1, shape[dim]))]
    return np.array([np.insert(columns[c], dim, r) for r, c in [(0, 0), *away.tolist(), *home]])


def _with_cores(chips: np.ndarray, cores: int) -> np.ndarray:
    """The walk over chips as one over cores: all of a chip, then those of the next."""
    core = np.tile(np.arange(cores), len(chips))
    return np.column_stack([np.repeat(chips, cores, axis=0), core])


def _check_size(mesh: Mesh, shape: tuple[int, ...], num_missing: int) -> None:
    cores = math.prod(shape) - num_missing
    if mesh.size > cores:
        others = mesh.size // mesh.axis_size("data")
        fits = f"data={cores // others}" if others <= cores else f"a product of at most {cores}"
        raise ValueError(
            f"The mesh {mesh} needs {mesh.size} cores. Received: a topology of "
            f"{' x '.join(map(str, shape[:3]))} chips with {shape[3]} cores each"
            f"{f', {num_missing} of them missing' if num_missing else ''}: {cores} cores. "
            f"What fits: {fits}."
        )
