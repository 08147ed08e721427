"""Rules of ops that work element by element, with broadcasting."""

from collections.abc import Sequence

from llmos_tf.partition.graph.choice import Choice, Rule, can_shard, reduced, same
from llmos_tf.partition.graph.flat_graph import Node, Value
from llmos_tf.partition.graph.placements import PARTIAL, REPLICATED, Partial, Placement, Sharded

_ELEMENTWISE = """
    Abs Acos Acosh Angle ApproximateEqual AsString Asin Asinh Atan Atan2 Atanh BesselI0
    BesselI0e BesselI1 BesselI1e BesselJ0 BesselJ1 BesselK0 BesselK0e BesselK1 BesselK1e
    BesselY0 BesselY1 Betainc BitwiseAnd BitwiseOr BitwiseXor Bucketize Ceil CheckNumerics
    CheckNumericsV2 ClipByValue Complex ComplexAbs Conj Cos Cosh Dawsn DecodeBase64 Digamma Div
    Elu EluGrad EncodeBase64 Equal Erf Erfc Erfinv Exp Expint Expm1 FakeQuantWithMinMaxArgs
    FakeQuantWithMinMaxArgsGradient Floor FloorDiv FloorMod FresnelCos FresnelSin Greater
    GreaterEqual Igamma IgammaGradA Igammac Imag Inv InvGrad Invert IsFinite IsInf IsNan
    LeakyRelu LeakyReluGrad LeftShift Less LessEqual Lgamma Log Log1p LogicalAnd LogicalNot
    LogicalOr Maximum Minimum Mod Ndtri NextAfter NotEqual OnesLike Polygamma PopulationCount
    Pow RandomGammaGrad Real Reciprocal ReciprocalGrad RegexFullMatch RegexReplace Relu Relu6
    Relu6Grad ReluGrad RightShift Rint Round Rsqrt RsqrtGrad Selu SeluGrad Sigmoid SigmoidGrad
    Sign Sin Sinh Softplus SoftplusGrad Softsign SoftsignGrad Spence Sqrt SqrtGrad Square
    SquaredDifference StaticRegexFullMatch StaticRegexReplace StringJoin StringLength
    StringLower StringStrip StringToHashBucket StringToHashBucketFast StringToHashBucketStrong
    StringToNumber StringUpper Substr Tan Tanh TanhGrad TruncateDiv TruncateMod UnicodeScript
    Xdivy Xlog1py Xlogy ZerosLike Zeta
"""

# Of one input, and linear in it.
LINEAR_UNARY = ("Identity", "Neg", "PreventGradient", "StopGradient", "Snapshot", "DeepCopy")
SUMS = ("Add", "AddN", "AddV2", "Sub")
# Linear in the first input where the second is the same on every rank.
_QUOTIENTS = ("DivNoNan", "RealDiv")


def elementwise(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Shards all inputs alike; what is broadcast along the sharded dimension stays whole.

    Args:
        node: the op.
        inputs: placements of its inputs.

    Returns:
        The choice; None where nothing is sharded or ranks are not known.
    """
    inputs = [reduced(placement) for placement in inputs]
    dim = _output_dim(node, inputs)
    return None if dim is None else sharded_along(node, dim)


def sharded_along(node: Node, dim: int) -> Choice | None:
    """Returns the choice in which the output of an elementwise op is sharded.

    Args:
        node: the op.
        dim: dimension of the output.

    Returns:
        The choice; None where the dimension does not count rows.
    """
    output = node.outputs[0]
    if not can_shard(output, dim):
        return None
    wanted = [_wanted(value, output, dim) for value in node.inputs]
    if None in wanted:
        return None
    return same(node, wanted, Sharded(dim))


def _output_dim(node: Node, inputs: Sequence[Placement]) -> int | None:
    """The dimension along which the output is sharded: that of the largest sharded input."""
    rank = node.outputs[0].rank
    sharded = [
        (value.rank, rank - value.rank + placement.dim)
        for value, placement in zip(node.inputs, inputs, strict=True)
        if isinstance(placement, Sharded) and rank is not None
    ]
    return max(sharded, key=lambda found: found[0])[1] if sharded else None


def _wanted(value: Value, output: Value, dim: int) -> Placement | None:
    """How an input is placed where dimension `dim` of the output is sharded."""
    if value.rank is None:
        return None
    own = value.rank - output.rank + dim
    if own < 0:
        return REPLICATED
    length = value.dims[own]
    if length is None:
        return None
    if length.length == 1 and output.dims[dim].length != 1:
        return REPLICATED
    return Sharded(own) if length.is_like(output.dims[dim]) else None


def linear_unary(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Keeps the placement of the only input."""
    return None if inputs[0] == REPLICATED else same(node, inputs, inputs[0])


def identities(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Keeps the placement of each input, as a custom gradient does."""
    del node
    return Choice(tuple(inputs), tuple(inputs))


def cast(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Keeps the placement; parts of a sum are rounded once they are added up."""
    source, target = node.inputs[0].dtype, node.outputs[0].dtype
    widens = source.is_floating and target.is_floating and target.size >= source.size
    if isinstance(inputs[0], Partial) and not widens:
        return same(node, [REPLICATED], REPLICATED)
    return linear_unary(node, inputs)


def total(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Adds: parts of sums stay parts."""
    if PARTIAL in inputs and not any(isinstance(p, Sharded) for p in inputs):
        return same(node, [PARTIAL] * len(inputs), PARTIAL)
    return elementwise(node, inputs)


def product(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Multiplies: a part of a sum by what every rank has is a part of the product."""
    if sorted(inputs, key=str) == [PARTIAL, REPLICATED]:
        return same(node, inputs, PARTIAL)
    return elementwise(node, inputs)


def quotient(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Divides: a part of a sum by what every rank has is a part of the quotient."""
    if tuple(inputs) == (PARTIAL, REPLICATED):
        return same(node, inputs, PARTIAL)
    return elementwise(node, inputs)


def select(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Selects: by a condition that every rank has, parts of sums stay parts."""
    if (
        inputs[0] == REPLICATED
        and PARTIAL in inputs
        and not any(isinstance(p, Sharded) for p in inputs)
    ):
        return same(node, [REPLICATED, PARTIAL, PARTIAL], PARTIAL)
    return elementwise(node, inputs)


def select_rows(node: Node, inputs: Sequence[Placement]) -> Choice | None:
    """Selects by the first version of the op, whose condition may be one number for each row."""
    condition, chosen = node.inputs[:2]
    if condition.rank is None or chosen.rank is None:
        return None
    if condition.rank != 1 or chosen.rank == 1:
        # A scalar or the shape of what is chosen.
        return elementwise(node, inputs)
    dim = next((p.dim for p in inputs if isinstance(p, Sharded)), None)
    if dim is None or not can_shard(node.outputs[0], dim):
        return None
    needed = [REPLICATED if dim else Sharded(0), Sharded(dim), Sharded(dim)]
    return same(node, needed, Sharded(dim))


RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(LINEAR_UNARY, linear_unary),
    **dict.fromkeys(SUMS, total),
    **dict.fromkeys(_QUOTIENTS, quotient),
    "Cast": cast,
    "IdentityN": identities,
    "Mul": product,
    "MulNoNan": elementwise,
    "Select": select_rows,
    "SelectV2": select,
}
