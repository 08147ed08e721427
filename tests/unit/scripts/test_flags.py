"""Flags: their list is frozen, their values are checked, and help needs no other page."""

import pytest
from absl import flags

from llmos_tf import Mesh
from llmos_tf.config import GPTConfig
from llmos_tf.scripts.checks import zero_note
from llmos_tf.scripts.flags import FLAGS
from llmos_tf.scripts.options import RunOptions, VerifyOptions
from llmos_tf.scripts.programs import setup_run
from llmos_tf.scripts.settings import sequence_length, train_options

pytestmark = pytest.mark.fast

# A new flag is a promise to keep: it is added here in the change that makes it.
NAMES = {
    "batches",
    "checkpoint",
    "context_method",
    "data",
    "device_memory",
    "draw_schedule",
    "dtype",
    "global_batch",
    "gradient_compression",
    "hidden_size",
    "json",
    "layout_map",
    "learning_rate",
    "max_new_tokens",
    "mesh",
    "microbatches",
    "model",
    "num_chunks",
    "num_heads",
    "num_layers",
    "offload",
    "patience",
    "png",
    "preset",
    "prompt",
    "ratio",
    "raw",
    "rematerialise",
    "reshard_after_forward",
    "resume",
    "rounds",
    "run",
    "save_every",
    "schedule",
    "seed",
    "seq_len",
    "sequence_parallel",
    "stages",
    "steps",
    "steps_in_round",
    "temperature",
    "threads_per_device",
    "tokenizer",
    "tolerance",
    "top_k",
    "top_p",
    "virtual_devices",
    "vocab_size",
    "workdir",
    "zero_stage",
}


def options(**changed):
    values = {name: FLAGS[name].default for name in RunOptions.__dataclass_fields__}
    return RunOptions(**(values | {"mesh": "data=2,tensor=2", "steps": 900} | changed))


def test_the_list_of_flags_is_frozen():
    """Fails when a flag appears or goes without its line above."""
    ours = FLAGS.flags_by_module_dict()["llmos_tf.scripts.flags"]
    assert {flag.name for flag in ours} == NAMES


def test_every_flag_says_what_it_is_for():
    """Fails for a flag whose help is missing or no sentence."""
    for name in NAMES:
        assert FLAGS[name].help.endswith("."), name


def test_defaults_are_a_run():
    """Fails if llmos-train without flags has options that it would refuse."""
    found = train_options()
    assert found.workdir.startswith("llmos_runs/gpt_tiny-")
    given = {"mesh": None, "seq_len": 128, "workdir": found.workdir}
    assert found == options(**given)
    # Without GPUs, of which TensorFlow knows.
    assert setup_run.with_mesh(found).mesh == "data=2,tensor=2"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"global_batch": 0}, "--global_batch must be at least 1. Received: 0"),
        ({"global_batch": 3}, "--global_batch=3 is split over data × fsdp = 2"),
        ({"steps": 0}, "--steps must be at least 1. Received: 0"),
        ({"save_every": -1}, "--save_every must be at least 1. Received: -1"),
        ({"seq_len": 1}, "--seq_len must be at least 2. Received: 1"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0. Received: 0.0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be above 0. Received: nan"),
        ({"seed": -1}, "--seed must be from 0 to 2147483647. Received: -1"),
        ({"mesh": None, "microbatches": 2}, "Received: no --mesh. Add pipe=2"),
        ({"mesh": "tensor=2", "zero_stage": 1}, "along the data axis, which has size 1"),
        ({"mesh": "fsdp=2", "gradient_compression": "int4"}, "powersgd. Received: 'int4'"),
        ({"virtual_devices": 0}, "--virtual_devices must be at least 1. Received: 0"),
        ({"data": ""}, "--data is empty"),
        ({"mesh": "data=2,pipes=2"}, "'pipes=2' does not fit"),
        ({"microbatches": 0}, "--microbatches must be at least 1. Received: 0"),
        ({"microbatches": 2}, "--microbatches=2 is for the axis pipe, which has size 1"),
        ({"schedule": "zb-h2"}, "zb-h1, zb-v. Received: 'zb-h2'"),
        ({"schedule": "zb-v"}, "--schedule=zb-v is for the axis pipe, which has size 1"),
        ({"num_chunks": 2}, "--num_chunks=2 is for the axis pipe"),
        (
            {"rematerialise": "blocks"},
            "must be one of none, full, block, selective, or",
        ),
        ({"offload": "weights"}, "'all', which is the same. Received: 'weights'"),
        ({"mesh": "pipe=2", "offload": "all"}, "Take offload='optimizer', or fsdp in place"),
        ({"context_method": "rings"}, "ring, ulysses. Received: 'rings'"),
        ({"context_method": "ulysses"}, "--context_method=ulysses is for the axis context"),
        ({"mesh": "pipe=2", "schedule": "interleaved"}, "Received: num_chunks=1"),
        (
            {"mesh": "data=2,pipe=2", "microbatches": 4, "global_batch": 12},
            "data × fsdp × microbatches = 8 parts",
        ),
        ({"json": "no/such/folder/out.json"}, "no/such/folder does not exist"),
    ],
)
def test_a_value_that_no_run_can_have(changed, words):
    """Fails if a wrong value is found only after minutes of training, or never."""
    with pytest.raises(ValueError, match=r"Received|--|zero_stage=1") as error:
        options(**changed)
    assert words in str(error.value)


def test_a_pipeline_is_a_run():
    """Fails if microbatches that fit are refused."""
    given = options(mesh="data=2,pipe=2", microbatches=4, schedule="zb-v", global_batch=16)
    assert (given.microbatches, given.schedule) == (4, "zb-v")


def test_options_reach_the_strategy(monkeypatch):
    """Fails if a flag is read and has no effect."""
    monkeypatch.setattr(setup_run, "MeshStrategy", lambda mesh, **given: (mesh, given))
    given = options(
        mesh="pipe=2,context=2",
        microbatches=4,
        schedule="interleaved",
        num_chunks=2,
        context_method="ulysses",
        gradient_compression="int8",
        rematerialise="block",
        offload="optimizer",
        virtual_devices=8,
    )
    mesh, values = setup_run.make_strategy(given)
    assert mesh == Mesh(pipe=2, context=2)
    expected = {
        "zero_stage": 0,
        "sequence_parallel": False,
        "num_microbatches": 4,
        "schedule": "interleaved",
        "num_chunks": 2,
        "context_method": "ulysses",
        "gradient_compression": "int8",
        "rematerialise": "block",
        "offload": "optimizer",
        "reshard_after_forward": False,
    }
    assert values == expected
    given = options(mesh="fsdp=8", rematerialise="5000", reshard_after_forward=True)
    _, values = setup_run.make_strategy(given)
    assert (values["rematerialise"], values["reshard_after_forward"]) == (5000, True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mesh": "context=4"}, "2 × context=4, which does not divide them"),
        ({"mesh": "context=4", "context_method": "ulysses"}, None),
        ({"mesh": "tensor=8", "sequence_parallel": True}, "over tensor=8"),
        ({"mesh": "context=2", "seq_len": 16}, None),
        ({"mesh": "context=2,tensor=2", "sequence_parallel": True}, "2 × context=2 × tensor=2"),
    ],
)
def test_positions_that_are_split(changed, words):
    """Fails if a length that an axis does not divide is found only when the model is traced, or
    one that it divides is refused."""
    config = GPTConfig(vocab_size=8, max_positions=20, hidden_size=8, num_heads=2, num_layers=1)
    given = options(**changed)
    if words is None:
        assert sequence_length(given, config) == (given.seq_len or 20)
        return
    with pytest.raises(
        ValueError, match=r"20 positions are split over .* multiple of 8\."
    ) as error:
        sequence_length(given, config)
    assert words in str(error.value)


def test_a_flag_for_one_of_several_meshes():
    """Fails if llmos-verify refuses an option that only some of its meshes have a use for, or takes
    one that none has."""
    values = {name: FLAGS[name].default for name in VerifyOptions.__dataclass_fields__}
    values |= {"model": "a:b", "batches": "a:c", "steps": 5, "microbatches": 2, "dtype": "float64"}
    VerifyOptions(**values | {"mesh": ("data=2", "pipe=2")})
    with pytest.raises(ValueError, match=r"--mesh=data=2 --mesh=fsdp=2. Add pipe=2"):
        VerifyOptions(**values | {"mesh": ("data=2", "fsdp=2")})


def test_zero_stage_beside_fsdp():
    """Fails if a flag that changes nothing, or shards less than it seems to, is taken silently."""
    assert "changes nothing" in zero_note(3, Mesh(fsdp=8))
    assert "along data as well" in zero_note(1, Mesh(data=2, fsdp=4))
    assert zero_note(0, Mesh(fsdp=8)) is None
    assert zero_note(1, Mesh(data=8)) is None


def test_the_flags_of_this_module_only():
    """Fails if a program defines flags of its own, which the list above would not see."""
    modules = [m for m in FLAGS.flags_by_module_dict() if m.startswith("llmos_tf")]
    assert modules == ["llmos_tf.scripts.flags"]
    assert isinstance(FLAGS, flags.FlagValues)
