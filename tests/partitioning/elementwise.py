"""Cases of the rules of `llmos_tf.partition.rules.elementwise`."""

import tensorflow as tf

from partitioning.cases import Input, N, case, raw

_ROWS = ((N, 3), (3, N))
# Pairs of shapes of two inputs that are broadcast.
_PAIRS = (
    ((N, 3), (N, 3)),
    ((N, 3), (3,)),
    ((3, N), (N,)),
    ((N, 1), (1, 3)),
    ((N, 1), (1, N)),
    ((N, 3), (2, N, 3)),
    ((2, N, 1), (N, 3)),
    ((), (N, 3)),
)


def _unary(names, kind, **attributes):
    return [
        case(name, raw(name, **attributes), Input(shape, kind))
        for name in names.split()
        for shape in (_ROWS if name == "Neg" else _ROWS[:1])
    ]


def _alike(names, count, kind, **attributes):
    """Ops of several inputs of one shape, or that are broadcast like one."""
    return [
        case(name, raw(name, **attributes), *[Input((N, 3), kind)] * count)
        for name in names.split()
    ]


def _broadcast(names, kind):
    return [
        case(name, raw(name), Input(first, kind), Input(second, kind))
        for name in names.split()
        for first, second in ((_PAIRS[0]), (_PAIRS[1]))
    ]


CASES = [
    *_unary(
        """Abs Asinh Atan BesselI0e BesselI1e Ceil Cos Cosh Elu Erf Erfc Exp Expm1 Floor IsFinite
        IsInf IsNan LeakyRelu OnesLike Relu Relu6 Rint Round Selu Sigmoid Sign Sin Sinh Softplus
        Softsign Square Tan Tanh ZerosLike Identity Neg StopGradient Snapshot DeepCopy""",
        "normal",
    ),
    *_unary("PreventGradient", "normal", message="no"),
    *_unary("CheckNumerics CheckNumericsV2", "normal", message="no"),
    *_unary("Acos Asin Atanh Erfinv Ndtri", "unit"),
    *_unary("Acosh Digamma Inv Lgamma Log Log1p Reciprocal Rsqrt Sqrt", "positive"),
    *_unary("Conj", "complex"),
    *_unary("Angle Imag Real ComplexAbs", "complex", Tout=tf.float64),
    *_unary(
        """BesselI0 BesselI1 BesselJ0 BesselJ1 BesselK0 BesselK0e BesselK1 BesselK1e BesselY0
        BesselY1 Dawsn Expint FresnelCos FresnelSin Spence""",
        "positive",
    ),
    *_unary("Bucketize", "normal", boundaries=[-1, 0, 0.5]),
    *_unary("FakeQuantWithMinMaxArgs", "float32", min=-1, max=1),
    *_alike("FakeQuantWithMinMaxArgsGradient", 2, "float32", min=-1, max=1),
    *_alike("ApproximateEqual", 2, "unit", tolerance=0.3),
    *_alike("RandomGammaGrad", 2, "positive"),
    *_unary("Invert PopulationCount", "int"),
    *_unary("LogicalNot", "bool"),
    *_unary("AsString", "int"),
    *_unary("EncodeBase64 StringLength StringLower StringStrip StringUpper", "text"),
    *_unary("DecodeBase64", "base64"),
    *_unary("StringToNumber", "digits"),
    *_unary("StaticRegexFullMatch", "text", pattern="[a-z]+"),
    *_unary("StaticRegexReplace", "text", pattern="[a-z]", rewrite="_"),
    *_unary("StringToHashBucket StringToHashBucketFast", "text", num_buckets=7),
    *_unary("StringToHashBucketStrong", "text", num_buckets=7, key=[1, 2]),
    *_unary("UnicodeScript", "int"),
    *_unary("Cast", "normal", DstT=tf.int32),
    *_unary("Cast", "float32", DstT=tf.float64),
    *_alike(
        "EluGrad LeakyReluGrad Relu6Grad ReluGrad SeluGrad SigmoidGrad SoftplusGrad SoftsignGrad "
        "TanhGrad InvGrad ReciprocalGrad NextAfter",
        2,
        "normal",
    ),
    *_alike("RsqrtGrad SqrtGrad", 2, "positive"),
    *_broadcast(
        "Atan2 Equal Greater GreaterEqual Less LessEqual NotEqual Maximum Minimum", "halves"
    ),
    *_broadcast("Div DivNoNan FloorDiv FloorMod Mod Pow RealDiv TruncateMod", "positive"),
    *_broadcast("MulNoNan SquaredDifference Sub", "normal"),
    *_broadcast("Igamma IgammaGradA Igammac Xdivy Xlog1py Xlogy", "positive"),
    *_broadcast("BitwiseAnd BitwiseOr BitwiseXor LeftShift RightShift TruncateDiv", "int"),
    *_broadcast("LogicalAnd LogicalOr", "bool"),
    *_broadcast("Add AddV2", "normal"),
    *_alike("Complex", 2, "normal", Tout=tf.complex128),
    *(case(name, raw(name), *pair) for name in ("AddV2", "Mul") for pair in _PAIRS),
    case("EnsureShape", raw("EnsureShape", shape=[None, 3]), (N, 3)),
    case("EnsureShape", raw("EnsureShape", shape=[3, None]), (3, N)),
    case("IdentityN", lambda *x: tf.raw_ops.IdentityN(input=x), (N, 3), (3, N)),
    case("AddN", lambda *x: tf.raw_ops.AddN(inputs=x), (N, 3), (N, 3)),
    case("AddN", lambda *x: tf.raw_ops.AddN(inputs=x), (3, N), (3, N), (3, N)),
    case("Betainc", raw("Betainc"), *[Input((N, 3), "unit")] * 3),
    case("ClipByValue", raw("ClipByValue"), (N, 3), Input((), "unit"), Input((), "positive")),
    case("Polygamma", raw("Polygamma"), Input((N,), "positive"), Input((3, N), "positive")),
    case("Zeta", raw("Zeta"), Input((N,), "positive"), Input((3, N), "positive")),
    case(
        "RegexFullMatch",
        lambda x: tf.strings.regex_full_match(x, tf.strings.lower("A.")),
        Input((N, 3), "text"),
    ),
    case(
        "RegexReplace",
        lambda x: tf.raw_ops.RegexReplace(input=x, pattern=tf.strings.lower("A"), rewrite="_"),
        Input((N, 3), "text"),
    ),
    case("StringJoin", lambda *x: tf.strings.join(x, "-"), *[Input((N, 3), "text")] * 2),
    case("StringJoin", lambda *x: tf.strings.join(x), Input((N,), "text"), Input((), "text")),
    case("Substr", lambda x: tf.strings.substr(x, 0, 1), Input((3, N), "text")),
    case(
        "Substr",
        lambda x, i: tf.strings.substr(x, tf.zeros_like(i), i),
        Input((N,), "text"),
        Input((N,), "index"),
    ),
    case("SelectV2", tf.where, Input((N, 3), "bool"), (N, 3), (N, 3)),
    case("SelectV2", tf.where, Input((N, 1), "bool"), (N, 3), ()),
    case("SelectV2", tf.where, Input((), "bool"), (3, N), (3, N)),
    case("SelectV2", tf.where, Input((3,), "bool"), (N, 3), (3,)),
    case("Select", raw("Select"), Input((N, 3), "bool"), (N, 3), (N, 3)),
    case("Select", raw("Select"), Input((N,), "bool"), (N, 3), (N, 3)),
    case("Select", raw("Select"), Input((), "bool"), (3, N), (3, N)),
]
