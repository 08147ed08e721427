"""Buckets: tensors that are communicated together.

A collective costs a latency and its bytes. Many small ones cost latencies; one of everything can
start only when all is there. So tensors travel in buckets, in the order in which they are made, and
a bucket leaves as soon as its last tensor is there, while the backward pass makes the next ones.
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple

# Above it a bucket is busy with bytes and not with latencies (PyTorch DDP's, arXiv 2006.15704).
MAX_BYTES = 25 * 2**20
# In a ring each of N ranks sends 2(N-1) times an N-th of a bucket. At 10 microseconds and 25 GB/s
# a link carries so much in the time of a latency; with smaller pieces it would mostly wait.
BYTES_OF_A_TURN = 2**18
# A quarter of the gradients is there after a quarter of the backward pass.
MIN_BUCKETS = 4


def default_bucket_bytes(ranks: int, total: int) -> int:
    """Returns how large buckets are, where the user has not said it.

    A quarter of what there is, so that three quarters can travel while the backward pass goes on;
    at most 25 MiB, above which a larger one is no faster; but at least 256 KiB for each rank of the
    ring, below which its latencies are what takes time.

    Args:
        ranks: in a group.
        total: bytes of all tensors that are reduced alike.

    Returns:
        Bytes.

    Example:
        >>> default_bucket_bytes(ranks=8, total=30_000_000)
        7500000
    """
    return max(ranks * BYTES_OF_A_TURN, min(MAX_BYTES, -(-total // MIN_BUCKETS)))


class Bucket(NamedTuple):
    """Tensors that are communicated together.

    Args:
        key: what they have in common.
        members: their indices, in the order in which they are made.
        ready: when the last of them is made.
    """

    key: Hashable
    members: tuple[int, ...]
    ready: int


def plan_buckets(
    keys: Mapping[int, Hashable],
    sizes: Mapping[int, int],
    made: Mapping[int, int],
    limits: Mapping[Hashable, int],
) -> list[Bucket]:
    """Puts tensors into buckets in the order in which they are made.

    Args:
        keys: index of a tensor to what it has in common with others of its bucket.
        sizes: index to bytes.
        made: index to when the tensor is made, as a number; of those that are made at once the
            later ones come first, as the backward pass goes from the last layer to the first.
        limits: key to the bytes of a bucket; a larger tensor is one by itself.

    Returns:
        The buckets, in the order in which they are complete.
    """
    open_buckets: dict[Hashable, tuple[list[int], int]] = {}
    closed = []
    for i in sorted(keys, key=lambda i: (made[i], -i)):
        key = keys[i]
        members, total = open_buckets.get(key, ([], 0))
        if members and total + sizes[i] > limits[key]:
            closed.append((key, members))
            members, total = [], 0
        open_buckets[key] = ([*members, i], total + sizes[i])
    closed += [(key, members) for key, (members, _) in open_buckets.items()]
    buckets = [Bucket(key, tuple(m), max(made[i] for i in m)) for key, m in closed]
    return sorted(buckets, key=lambda bucket: bucket.ready)
