"""Rules by which ops are partitioned, as tables from op type to rule."""

from llmos_tf.partition.rules import (
    creation,
    elementwise,
    indexing,
    lists,
    movement,
    products,
    randomness,
    reductions,
    rowwise,
)
from llmos_tf.partition.rules.elementwise import sharded_along

__all__ = [
    "ALWAYS",
    "CREATIONS",
    "DRAWN",
    "LISTS",
    "PASS_PARTS",
    "PHILOX",
    "RULES",
    "is_elementwise",
    "sharded_along",
]

# Ops that work otherwise on a rank than on one device, also where every rank has all inputs.
ALWAYS = frozenset(
    ("Shape", "ShapeN", "Size", "Squeeze", "TensorListElementShape", *randomness.RULES)
)

# Ops that a part of a sum may pass. Any other needs the sum.
_PASS_PARTS = """
    AccumulateNV2 Add AddN AddV2 AssignAddVariableOp AssignSubVariableOp BiasAddGrad BroadcastTo
    Case Cast ConcatV2 DivNoNan EnsureShape ExpandDims GatherV2 Identity IdentityN If Mean Mul
    Neg Pack Pad PreventGradient Rank RealDiv Reshape SelectV2 Shape ShapeN Size Slice Snapshot
    Split SplitV Squeeze StatelessCase StatelessIf StatelessWhile StopGradient StridedSlice
    StridedSliceGrad Sub Sum Tile Transpose Unpack UnsortedSegmentSum While
"""
PASS_PARTS = frozenset(_PASS_PARTS.split())

CREATIONS = creation.CREATIONS | lists.CREATIONS
# Ops of which a rank can draw its own rows, and those that draw from a state of their own.
PHILOX = creation.PHILOX
DRAWN = frozenset(randomness.RULES)
# Ops that make lists without elements, or optional values: made in the placement in which they
# are needed.
LISTS = frozenset(lists.CREATIONS)

RULES = {
    **elementwise.RULES,
    **reductions.RULES,
    **products.RULES,
    **movement.RULES,
    **indexing.RULES,
    **rowwise.RULES,
    **randomness.RULES,
    **creation.RULES,
    **lists.RULES,
}


def is_elementwise(kind: str) -> bool:
    """Returns whether ops of a type work element by element.

    Args:
        kind: type of the op.

    Returns:
        True for those of `rules.elementwise`.
    """
    return kind in elementwise.RULES
