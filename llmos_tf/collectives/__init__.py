"""Communication along named mesh axes, each function with its gradient.

The functions run in a replica's program, inside ``strategy.run`` of a mesh strategy; their maths
and groups are described in `llmos_tf.collectives.functions`. `traffic` reports what a step sends.
"""

from llmos_tf.collectives.functions import (
    all_gather,
    all_reduce,
    all_to_all,
    axis_index,
    axis_size,
    broadcast,
    copy_to_axis,
    gather_from_axis,
    permute,
    reduce_from_axis,
    reduce_scatter,
    split_to_axis,
)
from llmos_tf.collectives.traffic_report import traffic

__all__ = [
    "all_gather",
    "all_reduce",
    "all_to_all",
    "axis_index",
    "axis_size",
    "broadcast",
    "copy_to_axis",
    "gather_from_axis",
    "permute",
    "reduce_from_axis",
    "reduce_scatter",
    "split_to_axis",
    "traffic",
]
