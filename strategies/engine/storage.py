"""How a partitioned program reads and writes the variables of a mesh."""

from typing import Any

import tensorflow as tf

from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Placement
from llmos_tf.partition.manual import Storage
from llmos_tf.sharding import MetricVariable, SeedVariable, ShardedVariable

# The value after an assignment, of the one before and what is assigned.
_CHANGED = {
    "assign": lambda before, value: value,
    "assign_add": lambda before, value: before + value,
    "assign_sub": lambda before, value: before - value,
}


class _Whole:
    """Every rank has the variable, or gathers what is cut flat along `fsdp` (ZeRO stage 3)."""

    placement: Placement = REPLICATED

    def __init__(self, variable: ShardedVariable):
        self._variable = variable

    def read(self, emission: Any) -> tf.Tensor:
        """Returns the whole value."""
        del emission
        variable = self._variable
        part = variable.part()
        return part if variable.layout.is_whole else variable.gathered_from("full", part)

    def write(self, emission: Any, method: str, value: tf.Tensor) -> None:
        """Stores the rank's part of a whole value."""
        variable = self._variable
        is_statistic = variable.dtype.is_floating and not variable.trainable
        if is_statistic and not isinstance(emission.all_rows, int):
            # Of a batch without rows it, a mean of nothing, would be NaN.
            before = self.read(emission)
            value = _CHANGED[method](before, value)
            method, value = "assign", tf.where(emission.all_rows > 0, value, before)
        with tf.device(variable.host):
            part = variable.layout.part_from_full(value, emission.program.mesh)
            getattr(variable.component, method)(part)


class _Seed:
    """The state of a random stream of one device, which ranks store apart from each other's."""

    placement: Placement = REPLICATED

    def __init__(self, variable: SeedVariable):
        self._variable = variable

    def read(self, emission: Any) -> tf.Tensor:
        """Returns the state of one device."""
        return self._variable.part() - self._variable.shift_of(emission.index)

    def write(self, emission: Any, method: str, value: tf.Tensor) -> None:
        """Stores a state of one device, or adds to it."""
        component = self._variable.component
        if method == "assign":
            value = value + self._variable.shift_of(emission.index)
        getattr(component, method)(value)


class _Metric:
    """The state of a metric: a sum of what the ranks hold, or one value of all."""

    def __init__(self, variable: MetricVariable):
        self._variable = variable
        self.placement: Placement = PARTIAL if variable.total_is_shared else REPLICATED

    def read(self, emission: Any) -> tf.Tensor:
        """Returns what the rank holds."""
        return self._variable.component_of(emission.program).read_value()

    def write(self, emission: Any, method: str, value: tf.Tensor) -> None:
        """Stores what the rank holds."""
        getattr(self._variable.component_of(emission.program), method)(value)


_KINDS = ((MetricVariable, _Metric), (SeedVariable, _Seed), (ShardedVariable, _Whole))


def storage_of(variable: Any) -> Storage:
    """Returns how a variable of the mesh is stored.

    Args:
        variable: a distributed variable.

    Returns:
        The storage.
    """
    return next(make(variable) for kind, make in _KINDS if isinstance(variable, kind))
