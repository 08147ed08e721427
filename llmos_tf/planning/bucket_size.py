"""How many bytes of gradients are reduced together, where the user has not said it."""

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
