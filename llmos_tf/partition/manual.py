"""What a plan leaves to others: where variables are stored, and regions written for one rank."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf

from llmos_tf.partition.graph.choice import Choice
from llmos_tf.partition.graph.flat_graph import Node
from llmos_tf.partition.graph.placements import Placement


@runtime_checkable
class Storage(Protocol):
    """How a variable is stored on the ranks.

    Attributes:
        placement: what a rank reads and writes.
    """

    placement: Placement

    def read(self, emission: Any) -> tf.Tensor:
        """Returns the value, placed so, while a rank's program is made."""

    def write(self, emission: Any, method: str, value: tf.Tensor) -> None:
        """Stores a value that is placed so, by `assign`, `assign_add` or `assign_sub`."""


class Region(Protocol):
    """A stretch of a global graph that is written as a rank's program, as `shard_map` in JAX.

    In the graph it is one op with the attribute `ATTRIBUTE`, the region's number.
    """

    ATTRIBUTE = "_region"

    def choice(self, node: Node, found: Sequence[Placement]) -> Choice:
        """Returns how the region wants its inputs, and makes its outputs."""
