"""What is counted of a traced step is what the closed formulas say, to the byte, on every mesh.

The two know nothing of each other: one reads the graph, the other the architecture.
"""

import threading
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import Mesh
from llmos_tf.collectives.traffic_report import stage_tallies
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import (
    GPT,
    GPTConfig,
    Llama,
    LlamaConfig,
    Mixtral,
    MixtralConfig,
)
from llmos_tf.planning import TrainingStep, step_traffic
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.pipeline.placement import placement_of
from llmos_tf.training import make_train_step

# Large enough that no activation is smaller than 1 KiB; 301 tokens are divided by no axis.
SIZES = {
    "vocab_size": 300,
    "max_positions": 32,
    "hidden_size": 48,
    "num_heads": 4,
    "num_layers": 2,
}
LLAMA = {**SIZES, "num_kv_heads": 2, "feed_forward_size": 96}
MODELS = {
    "gpt": (GPT, GPTConfig, SIZES),
    "llama": (Llama, LlamaConfig, LLAMA),
    "mixtral": (Mixtral, MixtralConfig, {**LLAMA, "num_experts": 4, "num_experts_per_token": 2}),
}
ODD, FOUR = {"vocab_size": 301}, {"num_layers": 4}
SP = {"sequence_parallel": True}
RESHARD = {"reshard_after_forward": True}
TIED = {"tie_embeddings": True}


def case(model, mesh, options=None, sizes=None, rows=8, nightly=False):
    names = [
        model,
        str(mesh),
        *(f"{k}={v}" for k, v in {**(options or {}), **(sizes or {})}.items()),
    ]
    marks = [pytest.mark.nightly] if nightly else []
    arguments = (model, mesh, options or {}, sizes or {}, rows)
    return pytest.param(*arguments, id="-".join(names), marks=marks)


CASES = [
    case("gpt", Mesh(data=4)),
    case("gpt", Mesh(data=4), {"zero_stage": 1}),
    case("llama", Mesh(data=3), {"zero_stage": 2}, ODD, rows=9),
    case("gpt", Mesh(fsdp=4), {"zero_stage": 3}),
    case("llama", Mesh(fsdp=3), {"zero_stage": 3}, ODD, rows=9, nightly=True),
    case("gpt", Mesh(fsdp=2), RESHARD),
    case("llama", Mesh(data=2, fsdp=2), RESHARD, ODD),
    case("llama", Mesh(fsdp=2, tensor=2), {**SP, **RESHARD}, TIED, nightly=True),
    case("mixtral", Mesh(fsdp=2, expert=2), RESHARD, nightly=True),
    # One layer is no stack, of which the blocks were known.
    case("gpt", Mesh(fsdp=2), RESHARD, {"num_layers": 1}, nightly=True),
    case("gpt", Mesh(tensor=2), nightly=True),
    case("gpt", Mesh(tensor=4), SP, ODD),
    # The tensor axis of 2 divides the key-value heads, that of 4 does not.
    case("llama", Mesh(tensor=2), SP, nightly=True),
    case("llama", Mesh(tensor=4), None, ODD),
    case("llama", Mesh(context=2)),
    case("llama", Mesh(context=2), {"context_method": "ulysses"}),
    case("mixtral", Mesh(expert=2)),
    case("mixtral", Mesh(expert=2), None, {"capacity_factor": 1.0}, nightly=True),
    case("gpt", Mesh(data=2, tensor=2), nightly=True),
    case("gpt", Mesh(fsdp=2, tensor=2)),
    case("gpt", Mesh(pipe=2), {"num_microbatches": 4}),
    case("llama", Mesh(pipe=2), {"schedule": "gpipe"}, TIED, nightly=True),
    case("gpt", Mesh(pipe=2), {"schedule": "interleaved", "num_chunks": 2}, FOUR, nightly=True),
    case("llama", Mesh(pipe=4), {"schedule": "zb-h1"}, FOUR),
    case("mixtral", Mesh(expert=2, tensor=2), SP, {"capacity_factor": 1.5}, nightly=True),
    case("mixtral", Mesh(expert=4), rows=2, nightly=True),
    # The experts' ranks can split neither rows nor positions.
    case("mixtral", Mesh(expert=2), None, {"max_positions": 31}, rows=3, nightly=True),
    case("mixtral", Mesh(expert=2, context=2), rows=3, nightly=True),
    case("llama", Mesh(data=2, fsdp=2, tensor=2), {"zero_stage": 1, **SP}, nightly=True),
    case("llama", Mesh(context=2, tensor=2), {"context_method": "ulysses"}, nightly=True),
    case("gpt", Mesh(pipe=2), {"schedule": "zb-v"}, FOUR, nightly=True),
    case("gpt", Mesh(pipe=4), None, FOUR, nightly=True),
    case("gpt", Mesh(pipe=4), {"schedule": "gpipe"}, FOUR, nightly=True),
    case(
        "llama",
        Mesh(pipe=4),
        {"schedule": "interleaved", "num_chunks": 2},
        {"num_layers": 8},
        nightly=True,
    ),
    case("gpt", Mesh(pipe=2, fsdp=2), nightly=True),
    case("llama", Mesh(pipe=2, context=2), nightly=True),
    case("mixtral", Mesh(pipe=2, data=2, expert=2), {"zero_stage": 1}, nightly=True),
]


def make_step(name, mesh, options, sizes):
    strategy = MeshStrategy(mesh, **options)
    kind, config, base = MODELS[name]
    with strategy.scope():
        model = kind(config(**{**base, **sizes}))
        optimizer = keras.optimizers.Adam()
    return strategy, model, make_train_step(model, optimizer, TokenCrossEntropy())


def blocks_of_part(model):
    """How many blocks the cut has put into each part, or None without a pipeline."""
    if model.distribute_strategy.mesh.axis_size("pipe") == 1:
        return None
    placement = placement_of(model)
    ends = [*placement.begins[1:], len(placement.units)]
    return [
        sum(unit.startswith("block_") for unit in placement.units[begin:end])
        for begin, end in zip(placement.begins, ends, strict=True)
    ]


# Of a model of one layer, which is no stack.
@pytest.mark.filterwarnings("ignore:reshard_after_forward=True has no effect")
@pytest.mark.parametrize(("name", "mesh", "options", "sizes", "rows"), CASES)
def test_counted_is_what_the_formulas_say(name, mesh, options, sizes, rows):
    """Fails if the step sends something twice, or the formula of a stage, a loop or a padding is
    another one than what is traced."""
    strategy, model, step = make_step(name, mesh, options, sizes)
    tokens = tf.TensorSpec([rows, model.config.max_positions], tf.int32)
    # Once for all stages.
    tallies = stage_tallies(strategy, step, (tokens, tokens))
    assert sorted(tallies) == list(range(mesh.axis_size("pipe")))
    expected = TrainingStep(
        config=model.config,
        mesh=mesh,
        global_batch=rows,
        sequence_length=model.config.max_positions,
        blocks_of_part=blocks_of_part(model),
        **options,
    )
    for stage, tally in tallies.items():
        counted = Counter()
        for sent, times in tally.items():
            if not sent.is_scalars:
                counted[sent.axes, sent.kind] += times * sent.wire
        formula = {
            (row["axis"], row["kind"]): row["bytes"] for row in step_traffic(expected, stage)
        }
        assert formula
        assert {key: round(wire) for key, wire in counted.items()} == formula


# The op of each kind on CPU devices, and what it is given of the whole tensor.
OPS = {
    "all_reduce": ("CollectiveReduceV2", 1),
    "all_gather": ("CollectiveGatherV2", 2),
    "reduce_scatter": ("CollectiveAllToAllV2", 1),
}


def test_what_runs_is_what_is_counted(monkeypatch):
    """Fails if a collective runs more or less often than it is counted: in the branches of the
    pipeline's loop, in its backward pass that is split, or in the update after it."""
    ran, lock = Counter(), threading.Lock()

    def observed(name):
        original = getattr(tf.raw_ops, name)

        def op(**arguments):
            y = original(**arguments)

            def note(_, size):
                with lock:
                    ran[name, int(size)] += 1
                return np.int32(0)

            # Not stateful, or the ops of the devices would wait for each other.
            first = tf.reshape(y, [-1])[:1]
            size = tf.size(arguments["input"])
            zero = tf.numpy_function(note, [first, size], tf.int32, stateful=False)
            return y + tf.cast(tf.reshape(zero, []), y.dtype)

        return op

    for name, _ in OPS.values():
        monkeypatch.setattr(tf.raw_ops, name, observed(name))
    options = {"schedule": "zb-h1", "num_microbatches": 4, **SP}
    strategy, model, step = make_step("gpt", Mesh(pipe=2, tensor=2), options, {})
    tokens = np.zeros([8, model.config.max_positions], "int32")
    step(tokens, tokens)
    ran.clear()
    step(tokens, tokens)
    counted = Counter()
    for tally in stage_tallies(strategy, step).values():
        for sent, times in tally.items():
            if sent.kind in OPS:
                name, parts = OPS[sent.kind]
                elements = sent.bytes // tf.as_dtype(sent.dtype).size // parts
                # Two ranks have the program of a stage.
                counted[name, elements] += 2 * times
    # Of single numbers, losses, results are not used on every rank.
    for seen in (ran, counted):
        for key in [key for key in seen if key[1] == 1]:
            del seen[key]
    assert len(counted) > 4
    assert ran == counted
