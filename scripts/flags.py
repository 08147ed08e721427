"""The flags of all programs, and how a program starts, helps and refuses.

A flag has one name and one meaning everywhere. Flags are read here only; from here on a run is the
options of scripts/options.py.
"""

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tensorflow as tf
from absl import app, flags

from llmos_tf.scripts.benchmark_options import BenchmarkOptions
from llmos_tf.scripts.options import PlanOptions, RunOptions, VerifyOptions

FLAGS = flags.FLAGS

flags.DEFINE_string("preset", "gpt_tiny", "Model size, a name in llmos_tf.models.PRESETS.")
flags.DEFINE_multi_string(
    "mesh",
    None,
    "Mesh axes, such as data=2,tensor=4; 1 for one device. By default data over all GPUs; without "
    "any, data=2,tensor=2 on virtual CPU devices. llmos-verify takes several, --mesh for each, by "
    "default data=2 and fsdp=2.",
)
flags.DEFINE_integer("zero_stage", 0, "ZeRO stage, 0 to 3; 3 needs an fsdp axis.")
flags.DEFINE_string(
    "gradient_compression",
    None,
    "What is sent of gradients that are summed: bf16, fp16, int8 or powersgd; by default all bits.",
)
flags.DEFINE_bool("sequence_parallel", False, "Also split positions over the tensor axis.")
flags.DEFINE_integer(
    "microbatches",
    None,
    "Parts of a batch that go down the pipe axis in turn; by default as many as there are stages, "
    "and twice as many in a picture of llmos-plan.",
)
flags.DEFINE_string(
    "schedule",
    "1f1b",
    "Order of the work on the pipe axis: gpipe, 1f1b, interleaved, zb-h1 or zb-v.",
)
flags.DEFINE_integer(
    "num_chunks", 1, "Parts of the model on a stage of the pipe axis, for interleaved."
)
flags.DEFINE_string(
    "context_method", "ring", "How attention crosses the context axis: ring or ulysses."
)
flags.DEFINE_string(
    "rematerialise",
    "none",
    "What the backward pass computes again in place of keeping it: none, full, block, selective, "
    "or the bytes that blocks may keep on a device.",
)
flags.DEFINE_string(
    "offload",
    None,
    "What lies in the host's memory in place of the devices': optimizer, parameters or all.",
)
flags.DEFINE_bool(
    "reshard_after_forward",
    False,
    "Let go of a block's gathered weights after its forward pass, on the fsdp axis, and gather "
    "them again for the backward pass.",
)
flags.DEFINE_integer("virtual_devices", None, "CPU devices to make; by default what --mesh needs.")
flags.DEFINE_integer("global_batch", 16, "Sequences in a step, over all devices.")
flags.DEFINE_integer("seq_len", None, "Tokens in a sequence; by default all the model's positions.")
flags.DEFINE_integer(
    "steps",
    None,
    "Steps to train, counted from the first start, by default 900; steps to verify, by default 5.",
)
flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate, after a warm-up; then a cosine.")
flags.DEFINE_string("data", "stdlib", "Corpus: stdlib, or a glob of text or .jsonl files.")
flags.DEFINE_string("tokenizer", None, "A tokenizer.json; by default the bytes are the tokens.")
flags.DEFINE_string("workdir", None, "Where results go; by default a new folder in llmos_runs/.")
flags.DEFINE_string("checkpoint", None, "A checkpoint, or a workdir whose latest is taken.")
flags.DEFINE_bool("resume", False, "Go on from the latest checkpoint in --workdir, bit for bit.")
flags.DEFINE_integer("save_every", 300, "Steps between checkpoints.")
flags.DEFINE_integer("seed", 0, "Seed of weights, data order, dropout and sampling.")
flags.DEFINE_string("json", None, "Also write the results to this file.")
flags.DEFINE_string("prompt", None, "Text to go on with.")
flags.DEFINE_integer("max_new_tokens", None, "Tokens to add; by default all positions left.")
flags.DEFINE_float("temperature", 0.7, "Divides the logits; 0 takes the likeliest token.")
flags.DEFINE_integer("top_k", None, "Sample among the k likeliest tokens.")
flags.DEFINE_float("top_p", None, "Sample among the likeliest tokens of this probability together.")
flags.DEFINE_string(
    "draw_schedule",
    None,
    "Pipeline schedule to draw: gpipe, 1f1b, interleaved, zb-h1 or zb-v.",
)
flags.DEFINE_integer("stages", 4, "Stages of the pipeline that is drawn.")
flags.DEFINE_string(
    "png",
    None,
    "File of the picture. By default llmos-plan's is schedule-<name>-<stages>x<microbatches>.png "
    "here, and llmos-benchmark draws none.",
)
flags.DEFINE_multi_string(
    "run",
    ["1", "pipe=2:microbatches=8"],
    "What is timed: a mesh and its options, MESH:name=value,..., 1 for one device, or another "
    "framework, as said above. Several, --run for each.",
)
flags.DEFINE_multi_string(
    "ratio",
    [],
    "RUN/RUN, such as data=4/mirrored=4: also tell the ratio of these two. Several, --ratio for "
    "each.",
)
flags.DEFINE_integer(
    "patience",
    900,
    "Seconds without an answer after which a run is ended as failed.",
)
flags.DEFINE_integer("rounds", 5, "In each, every run has its turn.")
flags.DEFINE_integer("steps_in_round", 3, "Steps of a run in a round.")
flags.DEFINE_integer(
    "threads_per_device",
    None,
    "Threads by which a CPU device computes; by default all cores', which PyTorch's processes "
    "share. JAX has no such setting.",
)
flags.DEFINE_integer("vocab_size", 8192, "Tokens of the vocabulary.")
flags.DEFINE_integer("hidden_size", 256, "Width of the model.")
flags.DEFINE_integer("num_heads", 8, "Attention heads.")
flags.DEFINE_integer("num_layers", 4, "Blocks.")
flags.DEFINE_string("model", None, "MODULE:FUNCTION that returns a compiled keras.Model.")
flags.DEFINE_string(
    "batches",
    None,
    "MODULE:FUNCTION that yields global batches (x, y) or (x, y, sample_weights).",
)
flags.DEFINE_string(
    "layout_map",
    None,
    "MODULE:FUNCTION that returns layouts for the tensor axis, such as "
    "{'.*/dense/kernel': (None, 'tensor')}; by default the model's own.",
)
flags.DEFINE_string("dtype", "float64", "Dtype policy in which all runs are made.")
flags.DEFINE_float(
    "tolerance",
    None,
    "Allowed is |Δ| <= tolerance · (1 + |value on one device|). By default 1e-9 in float64, 1e-4 "
    "in float32, 1e-2 in mixed_bfloat16 and mixed_float16.",
)

for _name in ("mesh", "run", "ratio"):
    # absl adds a sentence of its own.
    FLAGS[_name].help = FLAGS[_name].help.rpartition(";")[0]


def options_from_flags() -> RunOptions:
    """Returns the options of this run.

    Returns:
        The options, checked.

    Raises:
        ValueError: flags that do not go together.
    """  # noqa: DOC502
    values = {name: FLAGS[name].value for name in RunOptions.__dataclass_fields__}
    if values["mesh"] is None:
        gpus = len(tf.config.list_physical_devices("GPU"))
        values["mesh"] = [f"data={gpus}" if gpus else "data=2,tensor=2"]
    # The last one counts, as of any flag.
    values["mesh"] = values["mesh"][-1]
    if values["steps"] is None:
        values["steps"] = 900
    return RunOptions(**values)


def verify_options_from_flags() -> VerifyOptions:
    """Returns the options of a verification.

    Returns:
        The options, checked.

    Raises:
        ValueError: flags that do not go together.
    """  # noqa: DOC502
    values = {name: FLAGS[name].value for name in VerifyOptions.__dataclass_fields__}
    values["mesh"] = tuple(values["mesh"] or ("data=2", "fsdp=2"))
    if values["steps"] is None:
        values["steps"] = 5
    return VerifyOptions(**values)


def plan_options_from_flags() -> PlanOptions:
    """Returns the options of a plan.

    Returns:
        The options, checked.

    Raises:
        ValueError: flags that do not go together.
    """  # noqa: DOC502
    values = {name: FLAGS[name].value for name in PlanOptions.__dataclass_fields__}
    values["mesh"] = values["mesh"][-1] if values["mesh"] else None
    if values["microbatches"] is None and values["draw_schedule"]:
        values["microbatches"] = 2 * values["stages"]
    return PlanOptions(**values)


def benchmark_options_from_flags() -> BenchmarkOptions:
    """Returns the options of a benchmark.

    Returns:
        The options, checked.

    Raises:
        ValueError: flags that do not go together.
    """  # noqa: DOC502
    values = {name: FLAGS[name].value for name in BenchmarkOptions.__dataclass_fields__}
    for name in ("run", "ratio"):
        values[name] = tuple(values[name])
    values["seq_len"] = values["seq_len"] or 128
    return BenchmarkOptions(**values)


def start(main: Callable[[], int | None], used: Sequence[str]) -> None:
    """Runs a program: parses its flags, prints its help, exits with its status.

    Args:
        main: the program; returns its exit status, None for 0.
        used: names of the flags it reads.
    """
    doc = inspect.getmodule(main).__doc__
    # TensorFlow announces each strategy, and would do so above the program's own first line.
    tf.get_logger().setLevel("WARNING")
    app.run(lambda _: main(), flags_parser=lambda argv: _parse(argv, doc, used))


@contextlib.contextmanager
def refusing_misuse() -> Iterator[None]:
    """Turns what the user got wrong into one paragraph on stderr and exit status 2.

    Entered around the reading of options, files and checkpoints and the making of the model: what
    is raised later is a fault of the program, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        refuse(str(error))


def refuse(message: str) -> None:
    """Ends the program for a misuse.

    Args:
        message: what was received and what would work.
    """
    name = Path(sys.argv[0]).stem
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str], doc: str | None, names: Sequence[str]) -> list[str]:
    if any(arg in ("--help", "-help", "-h", "--helpfull", "--helpshort") for arg in argv[1:]):
        print(_help(doc or "", names))
        sys.exit(0)
    try:
        rest = FLAGS(argv)
    except flags.Error as error:
        refuse(f"{error}. See --help for the flags.")
    if len(rest) > 1:
        refuse(f"Only flags are taken, as --name=value. Received: {' '.join(rest[1:])!r}.")
    ours = FLAGS.get_flags_for_module(__name__)
    unused = [flag.name for flag in ours if flag.present and flag.name not in names]
    if unused:
        refuse(f"--{unused[0]} is not a flag of this program. See --help for the flags.")
    return rest


def _help(doc: str, names: Sequence[str]) -> str:
    lines = [doc.strip(), "", "Flags:"]
    for name in names:
        flag = FLAGS[name]
        default = "" if flag.default is None else f" (default: {flag.default_as_str})"
        lines.append(f"  --{name}")
        lines.extend(
            textwrap.wrap(
                f"{flag.help}{default}", 76, initial_indent="      ", subsequent_indent="      "
            )
        )
    return "\n".join(lines)
