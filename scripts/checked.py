"""From flags to the options of llmos-verify, llmos-plan and llmos-benchmark. No TensorFlow."""

from llmos_tf.scripts import flags
from llmos_tf.scripts.benchmark_options import BenchmarkOptions
from llmos_tf.scripts.options import VerifyOptions
from llmos_tf.scripts.plan_options import PlanOptions


def verify_options() -> VerifyOptions:
    """Returns the options of llmos-verify.

    Returns:
        The options, checked.

    Raises:
        ValueError: flags that do not go together.
    """  # noqa: DOC502
    values = flags.read(VerifyOptions.__dataclass_fields__)
    values["mesh"] = tuple(values["mesh"] or ("data=2", "fsdp=2"))
    values["dtype"] = values["dtype"] or "float64"
    if values["steps"] is None:
        values["steps"] = 5
    return VerifyOptions(**values)


def plan_options() -> PlanOptions:
    """Returns the options of llmos-plan.

    Returns:
        The options, checked.

    Raises:
        ValueError: flags that do not go together.
    """  # noqa: DOC502
    values = flags.read(PlanOptions.__dataclass_fields__)
    values["mesh"] = values["mesh"][-1] if values["mesh"] else None
    values["dtype"] = values["dtype"] or "float32"
    if values["microbatches"] is None and values["draw_schedule"]:
        values["microbatches"] = 2 * values["stages"]
    return PlanOptions(**values)


def benchmark_options() -> BenchmarkOptions:
    """Returns the options of llmos-benchmark.

    Returns:
        The options, checked.

    Raises:
        ValueError: flags that do not go together.
    """  # noqa: DOC502
    values = flags.read(BenchmarkOptions.__dataclass_fields__)
    for name in ("run", "ratio"):
        values[name] = tuple(values[name])
    values["seq_len"] = values["seq_len"] or 128
    return BenchmarkOptions(**values)
