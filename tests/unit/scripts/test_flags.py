"""Flags: their list is frozen, their values are checked, and help needs no other page."""

import pytest
from absl import flags

from llmos_tf.scripts.flags import FLAGS, RunOptions, options_from_flags

# A new flag is a promise to keep: it is added here in the change that makes it.
NAMES = {
    "batches",
    "checkpoint",
    "data",
    "dtype",
    "global_batch",
    "json",
    "layout_map",
    "learning_rate",
    "max_new_tokens",
    "mesh",
    "model",
    "preset",
    "prompt",
    "resume",
    "save_every",
    "seed",
    "seq_len",
    "sequence_parallel",
    "steps",
    "temperature",
    "tokenizer",
    "tolerance",
    "top_k",
    "top_p",
    "virtual_devices",
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
    assert options_from_flags() == options()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"global_batch": 0}, "--global_batch is at least 1. Received: 0"),
        ({"global_batch": 3}, "--global_batch=3 is split over data × fsdp = 2"),
        ({"steps": 0}, "--steps is at least 1. Received: 0"),
        ({"save_every": -1}, "--save_every is at least 1. Received: -1"),
        ({"seq_len": 1}, "--seq_len is at least 2. Received: 1"),
        ({"learning_rate": 0.0}, "--learning_rate is above 0. Received: 0.0"),
        ({"learning_rate": float("nan")}, "--learning_rate is above 0. Received: nan"),
        ({"seed": -1}, "--seed is from 0 to 2147483647. Received: -1"),
        ({"resume": True}, "--resume goes on from a checkpoint in --workdir"),
        ({"data": ""}, "--data is empty"),
        ({"mesh": "data=2,pipes=2"}, "'pipes=2' does not fit"),
        ({"json": "no/such/folder/out.json"}, "no/such/folder does not exist"),
    ],
)
def test_a_value_that_no_run_can_have(changed, words):
    """Fails if a wrong value is found only after minutes of training, or never."""
    with pytest.raises(ValueError, match=r"Received|--") as error:
        options(**changed)
    assert words in str(error.value)


def test_the_flags_of_this_module_only():
    """Fails if a program defines flags of its own, which the list above would not see."""
    modules = [m for m in FLAGS.flags_by_module_dict() if m.startswith("llmos_tf")]
    assert modules == ["llmos_tf.scripts.flags"]
    assert isinstance(FLAGS, flags.FlagValues)
