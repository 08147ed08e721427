"""Rows sorted by expert, and rows that travel to the ranks of their experts and back.

Nothing is padded that is computed with: an expert multiplies the rows it was sent and no others
(dropless, as MegaBlocks, arXiv 2211.15841). Lengths depend on the routing, so they are dynamic.

Suffixes: n rows, W their width. A row's *group* is the expert it is for; the number after the last
is that of no expert.
"""

from collections.abc import Callable

import tensorflow as tf

from llmos_tf import collectives

AXIS = "expert"
# A rank's buffers of rows have at most about so many lengths: TensorFlow keeps a collective's
# parameters for each length that it has seen.
_NUM_LENGTHS = 64

Apply = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def apply_grouped(apply: Apply, x_nW: tf.Tensor, groups_n: tf.Tensor, num_groups: int) -> tf.Tensor:
    """Applies a function to rows that were sorted by group, and puts the results back in order.

    Args:
        apply: of the sorted rows ``[n', W]`` of all groups and the number of each, int32
            ``[num_groups]``; returns ``[n', W]``.
        x_nW: rows.
        groups_n: int32, group of each row; `num_groups` for a row of none, whose result is zero.
        num_groups: number of groups.

    Returns:
        ``[n, W]``.
    """
    slots_n, counts = _sorted_slots(groups_n, num_groups + 1)
    num_sorted = tf.reduce_sum(counts[:-1])
    sorted_nW = _place(x_nW, slots_n, tf.shape(x_nW)[0])
    y_nW = apply(sorted_nW[:num_sorted], counts[:-1])
    return _take(tf.pad(y_nW, [[0, counts[-1]], [0, 0]]), slots_n)


def apply_at_owners(
    apply: Apply, x_nW: tf.Tensor, experts_n: tf.Tensor, num_experts: int
) -> tf.Tensor:
    """Sends rows to the ranks of their experts by all-to-all, applies a function there, and back.

    Rank i of the `expert` axis owns the i-th equal part of the experts. Each pair of ranks
    exchanges as many rows as the fullest pair needs.

    Args:
        apply: as for `apply_grouped`, for the experts that this rank owns.
        x_nW: this rank's rows; as many on every rank of the axis.
        experts_n: int32, expert of each row; `num_experts` for none, whose result is zero.
        num_experts: number of experts, a multiple of the axis.

    Returns:
        ``[n, W]``, results for this rank's rows.

    Reference:
        Lepikhin et al., GShard (arXiv 2006.16668), section 3.2: the all-to-all.
    """
    ways = collectives.axis_size(AXIS)
    owned = num_experts // ways
    num_rows = tf.shape(x_nW)[0]
    slots_n, counts = _sorted_slots(experts_n, num_experts + 1)
    num_dropped = counts[-1]
    # How many rows each rank has for each expert: [from, to, expert of the receiver].
    sent = tf.reshape(collectives.all_gather(counts[:-1], AXIS), [ways, ways, owned])
    pairs = tf.reduce_sum(sent, -1)
    # At least one: TensorFlow's exchange does not survive a buffer of no rows.
    room = _rounded_up(tf.maximum(tf.reduce_max(pairs), 1), num_rows)
    usual = _usual_rows(x_nW.shape[0], ways)
    mine = collectives.axis_index(AXIS)

    # Rows in the order of experts, with a gap after those of each rank; dropped ones at the end.
    gaps = room * tf.range(ways + 1) - tf.cumsum(tf.concat([[0], pairs[mine]], 0))
    slots_n += tf.gather(gaps, experts_n // owned)
    buffer = _place(x_nW, slots_n, ways * room + num_dropped)[: ways * room]
    received = collectives.all_to_all(buffer, AXIS, usual_length=usual)
    groups = _received_groups(sent[:, mine], room)
    y = apply_grouped(apply, received, groups, owned)
    returned = collectives.all_to_all(y, AXIS, usual_length=usual)
    return _take(tf.pad(returned, [[0, num_dropped], [0, 0]]), slots_n)


def _received_groups(counts: tf.Tensor, room: tf.Tensor) -> tf.Tensor:
    """Groups of the rows in a buffer ``[from, room]``, of which `counts` ``[from, group]`` are."""
    ends = tf.cumsum(counts, axis=1)
    is_after = tf.range(room)[tf.newaxis, :, tf.newaxis] >= ends[:, tf.newaxis]
    return tf.reshape(tf.reduce_sum(tf.cast(is_after, tf.int32), -1), [-1])


def _sorted_slots(groups_n: tf.Tensor, num_groups: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Where each row goes when rows are sorted by group, in their order; and the groups' counts."""
    is_of_nG = tf.one_hot(groups_n, num_groups, dtype=tf.int32)
    before_nG = tf.cumsum(is_of_nG, exclusive=True)
    counts = tf.reduce_sum(is_of_nG, 0)
    starts = tf.cumsum(counts, exclusive=True)
    return tf.reduce_sum(is_of_nG * (before_nG + starts), -1), counts


def _rounded_up(room: tf.Tensor, num_rows: tf.Tensor) -> tf.Tensor:
    unit = tf.maximum(1, num_rows // _NUM_LENGTHS)
    return -(-room // unit) * unit


def _usual_rows(num_rows: int | None, ways: int) -> int | None:
    """Rows of a buffer where each pair of ranks exchanges as many, in place of what routing says.

    None where the number of rows is not static.
    """
    if num_rows is None:
        return None
    unit = max(1, num_rows // _NUM_LENGTHS)
    return ways * (-(-num_rows // (ways * unit)) * unit)


def _place(x_nW: tf.Tensor, slots_n: tf.Tensor, length: int | tf.Tensor) -> tf.Tensor:
    """Rows in their slots, of which no two are the same; zeros in the others."""
    placed = tf.scatter_nd(slots_n[:, tf.newaxis], x_nW, [length, tf.shape(x_nW)[1]])
    placed.set_shape([None, x_nW.shape[1]])
    return placed


@tf.custom_gradient
def _take(x_mW: tf.Tensor, slots_n: tf.Tensor) -> tf.Tensor:
    """Rows out of their slots. `tf.gather` would have a sparse gradient."""

    length = tf.shape(x_mW)[0]

    def gradient(upstream):
        return _place(upstream, slots_n, length), None

    return tf.gather(x_mW, slots_n), gradient
