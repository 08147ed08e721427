"""Placements: how the tensors of the ranks relate to the global tensor.

The names are those of GSPMD (arXiv 2105.04663) and DTensor. Each is along one group of ranks.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Replicated:
    """Every rank has the global tensor."""

    def __str__(self) -> str:
        return "replicated"


@dataclass(frozen=True)
class Sharded:
    """Each rank has consecutive entries along one dimension, in the order of the ranks.

    Ranks may have unlike numbers of them, or none.

    Args:
        dim: the dimension, not negative.
    """

    dim: int

    def __str__(self) -> str:
        return f"sharded along dimension {self.dim}"


@dataclass(frozen=True)
class Partial:
    """The global tensor is a reduction of the ranks' tensors, element by element.

    Args:
        reduction: "sum", "max" or "min".
    """

    reduction: str = "sum"

    def __str__(self) -> str:
        return f"partial {self.reduction}"


Placement = Replicated | Sharded | Partial

REPLICATED = Replicated()
PARTIAL = Partial()
