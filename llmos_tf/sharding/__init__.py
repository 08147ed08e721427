"""Layouts of variables on a mesh: how they are cut, found by path, read and written."""

from llmos_tf.sharding.layout import Layout
from llmos_tf.sharding.layout_rules import LayoutRules, announce_layouts, mesh_axis_size
from llmos_tf.sharding.local_reads import (
    layout_of,
    local_slice,
    mark_partial_gradient,
    read_for_all,
)
from llmos_tf.sharding.state_variables import MetricVariable, SeedVariable
from llmos_tf.sharding.variables import ShardedVariable

__all__ = [
    "Layout",
    "LayoutRules",
    "MetricVariable",
    "SeedVariable",
    "ShardedVariable",
    "announce_layouts",
    "layout_of",
    "local_slice",
    "mark_partial_gradient",
    "mesh_axis_size",
    "read_for_all",
]
