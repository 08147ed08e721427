"""The flags of all programs: one name and one meaning each. No TensorFlow.

Flags are defined and read here only; the rest of a program works with the checked options of
`scripts.options`. A help text that fits one program only is in that program's `Program`.
"""

from collections.abc import Iterable
from typing import Any

from absl import flags

FLAGS = flags.FLAGS

flags.DEFINE_string("preset", "gpt_tiny", "Model size, one of the list below.")
flags.DEFINE_multi_string(
    "mesh",
    None,
    "Mesh axes, such as data=2,tensor=4; 1 for one device. By default data over all GPUs; without "
    "GPUs, data=2,tensor=2 on virtual CPU devices.",
)
flags.DEFINE_integer(
    "zero_stage",
    0,
    "Sharding along the data axis: 1 shards optimizer state, 2 accumulated gradients too. An fsdp "
    "axis shards parameters, gradients and optimizer state at any stage; 3 only checks that there "
    "is one.",
)
flags.DEFINE_string(
    "gradient_compression",
    None,
    "Encoding of gradients that are summed: bf16, fp16, int8 or powersgd; by default none.",
)
flags.DEFINE_bool("sequence_parallel", False, "Also split positions over the tensor axis.")
flags.DEFINE_integer(
    "microbatches",
    None,
    "Microbatches of a batch on the pipe axis; by default one per stage.",
)
flags.DEFINE_string(
    "schedule",
    "1f1b",
    "Order of the work on the pipe axis: gpipe, 1f1b, interleaved, zb-h1 or zb-v.",
)
flags.DEFINE_integer(
    "num_chunks", 1, "Chunks of the model on a stage of the pipe axis, for interleaved."
)
flags.DEFINE_string("context_method", "ring", "Attention across the context axis: ring or ulysses.")
flags.DEFINE_string(
    "rematerialise",
    "none",
    "Activations that the backward pass recomputes instead of keeping them: none, full, block, "
    "selective, or the bytes that blocks may keep on a device.",
)
flags.DEFINE_string(
    "offload",
    None,
    "State kept in the host's memory instead of the devices': optimizer, parameters or all.",
)
flags.DEFINE_bool(
    "reshard_after_forward",
    False,
    "Free a block's gathered weights after its forward pass, on the fsdp axis, and gather them "
    "again for the backward pass.",
)
flags.DEFINE_integer(
    "virtual_devices", None, "Virtual CPU devices to create; by default one per rank of the mesh."
)
flags.DEFINE_integer("global_batch", 16, "Sequences in a step, over all devices.")
flags.DEFINE_integer("seq_len", None, "Tokens in a sequence; by default all the model's positions.")
flags.DEFINE_integer("steps", None, "Steps in total, from step 1; by default 900.")
flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate, after a warm-up; then a cosine.")
flags.DEFINE_string("data", "stdlib", "Corpus: stdlib, or a glob of text or .jsonl files.")
flags.DEFINE_string(
    "tokenizer", None, "Path of a tokenizer.json, or bytes, the default: a token is a byte."
)
flags.DEFINE_string("workdir", None, "Folder of the run; by default a new one in llmos_runs/.")
flags.DEFINE_string(
    "checkpoint", None, "A checkpoint, or the folder of a run, whose latest checkpoint is read."
)
flags.DEFINE_bool("resume", False, "Continue a run from its latest checkpoint.")
flags.DEFINE_integer("save_every", 300, "Steps between checkpoints.")
flags.DEFINE_integer("seed", 0, "Seed of all random numbers.")
flags.DEFINE_string("json", None, "Also write the results to this file.")
flags.DEFINE_string("prompt", None, "Text to continue.")
flags.DEFINE_integer("max_new_tokens", None, "Tokens to add; by default all positions left.")
flags.DEFINE_float("temperature", 0.7, "Divides the logits; 0 takes the likeliest token.")
flags.DEFINE_integer("top_k", None, "Sample among the k likeliest tokens.")
flags.DEFINE_float("top_p", None, "Sample among the likeliest tokens of this total probability.")
flags.DEFINE_bool("raw", False, "Print control characters as they are instead of escaped.")
flags.DEFINE_string(
    "draw_schedule",
    None,
    "Pipeline schedule to draw: gpipe, 1f1b, interleaved, zb-h1 or zb-v.",
)
flags.DEFINE_integer("stages", 4, "Stages of the pipeline that is drawn.")
flags.DEFINE_string("device_memory", None, "Memory of a device, such as 80GB or 24GiB.")
flags.DEFINE_string("png", None, "File of the picture.")
flags.DEFINE_multi_string(
    "run",
    ["1", "pipe=2:microbatches=8"],
    "What is timed: a mesh and its options, MESH:name=value,..., 1 for one device, or another "
    "framework, as listed above. Repeat the flag for each run.",
)
flags.DEFINE_multi_string(
    "ratio",
    [],
    "RUN/RUN, such as data=4/mirrored=4: also report the ratio of these two. Repeat the flag for "
    "each ratio.",
)
flags.DEFINE_integer(
    "patience",
    900,
    "Seconds without an answer after which a run is ended as failed.",
)
flags.DEFINE_integer("rounds", 5, "Rounds, in each of which every run has its turn.")
flags.DEFINE_integer("steps_in_round", 3, "Steps of a run in a round.")
flags.DEFINE_integer(
    "threads_per_device",
    None,
    "Threads of a CPU device; by default one per core, which PyTorch's processes share. JAX has no "
    "such setting.",
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
flags.DEFINE_string("dtype", None, "Dtype policy of Keras.")
flags.DEFINE_float(
    "tolerance",
    None,
    "Allowed is |Δ| <= tolerance · (1 + |value on one device|). By default 1e-9 in float64, 1e-4 "
    "in float32, 1e-2 in mixed_bfloat16 and mixed_float16.",
)

for _name in ("mesh", "run", "ratio"):
    # absl adds a sentence of its own.
    FLAGS[_name].help = FLAGS[_name].help.rpartition(";")[0]


def read(names: Iterable[str]) -> dict[str, Any]:
    """Returns the values of flags, and their defaults where they were not given.

    Args:
        names: of the flags.

    Returns:
        Name to value.
    """
    return {name: FLAGS[name].value for name in names}


def given(names: Iterable[str]) -> dict[str, Any]:
    """Returns the values of those flags that stand on the command line.

    Args:
        names: of the flags.

    Returns:
        Name to value, without flags that have their default.
    """
    return {name: FLAGS[name].value for name in names if FLAGS[name].present}
