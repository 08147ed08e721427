"""llmos-verify: what it says of models that are right, of planted faults, and of misuse."""

import json
import sys

import keras
import pytest
import tensorflow as tf

from llmos_tf.partition.emission import Emission
from llmos_tf.scripts import verify
from llmos_tf.sharding import Layout, SeedVariable
from llmos_tf.strategies.engine import variable_creation
from llmos_tf.strategies.gradients import sync

# A module as a user writes it. Batches are uneven, and both inputs and weights are there.
SOURCE = """
import keras
import numpy as np
import tensorflow as tf


def mlp(dropout=0.0, optimizer="adam", **options):
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    x = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    x = keras.layers.Dense(4, "tanh", name="hidden")(x)
    x = keras.layers.Dropout(dropout)(x)
    model = keras.Model(inputs, keras.layers.Dense(1, name="out")(x))
    model.compile(optimizer, "mse", weighted_metrics=["mae"], **options)
    return model


def with_dropout():
    return mlp(0.5)


def momentum():
    return mlp(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))


def layouts():
    return {"hidden/kernel": (None, "tensor")}


def wrong_layouts():
    return {"hiden/kernel": (None, "tensor")}


class ByHand(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(4, name="hidden")
        self.out = keras.layers.Dense(1)

    def call(self, inputs):
        return self.out(self.hidden(tf.concat([inputs["a"], inputs["b"]], -1)))

    def train_step(self, data):
        x, y, weights = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x) - y))
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {"by_hand": loss}


def layouts_by_hand():
    return {".*/hidden/kernel": (None, "tensor")}


def by_hand():
    model = ByHand()
    model.compile("adam")
    return model


def not_on_a_mesh():
    if tf.distribute.get_strategy().num_replicas_in_sync == 2:
        raise OSError("no room on two devices")
    return momentum()


def not_compiled():
    return keras.Sequential([keras.layers.Dense(1)])


def no_model():
    return "model"


def raises():
    return {}["key"]


only = momentum()


def the_same():
    return only


def batches(sizes=(8, 7, 3)):
    rng = np.random.default_rng(0)
    for rows in sizes:
        x = {"a": rng.normal(size=(rows, 3)), "b": rng.normal(size=(rows, 2))}
        yield x, rng.normal(size=(rows, 1)), rng.random(rows)


def even():
    return batches((4, 4))


def none():
    return []


def unlike():
    return [(np.ones((2, 3)), np.ones((3, 1)))]


def no_batches():
    return 3
"""


@pytest.fixture
def program(tmp_path, monkeypatch, run_program):
    """(model, *arguments, batches=...) -> `Finished`, in a folder that holds the user's module."""
    (tmp_path / "user_module.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(model, *arguments, batches="batches"):
        return run_program(
            verify,
            # Eight are there for all tests.
            "--virtual_devices=8",
            f"--model=user_module:{model}",
            f"--batches=user_module:{batches}",
            *arguments,
        )

    yield run
    sys.modules.pop("user_module", None)


def verdicts(path):
    """(mesh, feature) -> row of the JSON file."""
    rows = json.loads(path.read_text())["rows"]
    return {(row["mesh"], row["feature"]): row for row in rows}


def test_a_model_that_agrees(program, tmp_path):
    """Fails if nested inputs, weights or uneven batches are run in another way than on one device,
    a row or a kind of parallelism is missing, or the table and the file differ."""
    done = program(
        "with_dropout",
        "--mesh=data=2",
        "--mesh=fsdp=2,tensor=2",
        "--zero_stage=1",
        "--layout_map=user_module:layouts",
        "--json=out.json",
    )
    assert done.status == 0, done.out + done.err
    rows = verdicts(tmp_path / "out.json")
    features = ("gradients", "weights", "loss", "metrics", "storage", "dropout")
    assert list(rows) == [(mesh, f) for mesh in ("data=2", "fsdp=2,tensor=2") for f in features]
    assert {row["verdict"] for row in rows.values()} == {"agrees"}
    assert 0 < rows["data=2", "weights"]["difference"] < 1e-12
    for words in (
        "3 steps in float64",
        "data parallel + ZeRO stage 1",
        "ZeRO stage 3 + tensor parallel",
        "Its rate is set to 0",
        "All agree.",
    ):
        assert words in done.out
    assert done.out.count("  agrees\n") == 12
    assert "running fsdp=2,tensor=2" in done.err
    # What it sets for its runs does not stay.
    assert keras.config.floatx() == "float32"


# --- planted faults -------------------------------------------------------------------------------


def no_reduce(patch):
    patch.setattr(sync, "_reduce", lambda program, reduction, tensors, variables: list(tensors))


def shared_masks(patch):
    patch.setattr(SeedVariable, "shift_of", lambda self, index: tf.zeros([2], self.dtype))


def made_whole(patch):
    original = variable_creation._layouts

    def layouts(extended, path, shape, kwargs, beside):
        if path == "hidden/kernel":
            return (Layout((None, None)),) * 2
        return original(extended, path, shape, kwargs, beside)

    patch.setattr(variable_creation, "_layouts", layouts)


def mean_of_means(patch):
    original = Emission.global_shape

    def global_shape(emission, value, dim, x):
        patch.setattr(emission, "all_rows", 2 * emission.own_rows)
        return original(emission, value, dim, x)

    patch.setattr(Emission, "global_shape", global_shape)


FAULTS = {
    "a missing gradient reduce": (
        no_reduce,
        "momentum",
        "data=2",
        {"gradients": (1, "hidden/kernel"), "weights": (1, "hidden/kernel"), "loss": (2, "loss")},
        "Ranks hold different copies of it (rank 0 and rank 1)",
    ),
    "a dropout mask shared across data ranks": (
        shared_masks,
        "with_dropout",
        "data=2",
        {"dropout": (None, "dropout")},
        "draws the same mask on ranks 0 and 1, which differ on data",
    ),
    "a variable that is replicated instead of sharded": (
        made_whole,
        "momentum",
        "fsdp=2",
        {"storage": (None, "hidden/kernel")},
        "holds 160 bytes on rank 0; by its layout 80",
    ),
    "a mean of means": (
        mean_of_means,
        "momentum",
        "data=2",
        {"weights": (2, "hidden/kernel"), "loss": (2, "loss")},
        "Step 2 is the first one whose rows (7 over 2 parts) cannot be split evenly",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, program, tmp_path, monkeypatch):
    """Fails if the fault passes, another step, variable or feature is blamed, or the hint leads
    elsewhere."""
    plant, model, mesh, expected, words = FAULTS[fault]
    plant(monkeypatch)
    done = program(model, f"--mesh={mesh}", "--json=out.json")
    assert done.status == 1, done.err
    rows = verdicts(tmp_path / "out.json")
    failed = {f: (row["step"], row["variable"]) for (_, f), row in rows.items() if row["hint"]}
    failed.pop("metrics", None)
    assert failed == expected
    assert words in " ".join(done.out.split())
    assert done.out.count("  DIFFERS\n") == sum(r["verdict"] == "differs" for r in rows.values())


def test_a_loss_averaged_by_hand(program, tmp_path):
    """Fails if Adam hides that every gradient is R times one device's, or the hint does not say
    so; and if a train_step that reports no loss cannot be verified."""
    layouts = "--layout_map=user_module:layouts_by_hand"
    done = program("by_hand", "--mesh=data=2,tensor=2", layouts, "--json=out.json", batches="even")
    assert done.status == 1, done.err
    # Where a step is partitioned, its mean is that of the whole batch.
    assert program("by_hand", "--mesh=data=4", batches="even").status == 0
    rows = verdicts(tmp_path / "out.json")
    assert [feature for _, feature in rows] == ["gradients", "weights", "metrics", "storage"]
    assert rows["data=2,tensor=2", "gradients"]["difference"] > 0.1
    printed = " ".join(done.out.split())
    assert "All gradients are 2 times those of one device" in printed
    assert printed.count("Use self.compute_loss or a Keras loss") == 1
    assert rows["data=2,tensor=2", "weights"]["verdict"] == "differs"
    assert "All batches are split evenly" in done.out


def test_a_run_that_raises(program, tmp_path):
    """Fails if one mesh's error hides the other's result, is a traceback, or counts as nothing."""
    done = program("not_on_a_mesh", "--mesh=fsdp=2", "--mesh=data=3", "--json=out.json")
    assert done.status == 1
    rows = verdicts(tmp_path / "out.json")
    assert "OSError: no room on two devices" in rows["fsdp=2", "run"]["verdict"]
    assert rows["fsdp=2", "run"]["verdict"].startswith("error: ")
    assert rows["data=3", "weights"]["verdict"] == "agrees"
    printed = " ".join(done.out.split())
    assert "no room on two devices" in printed
    assert "user_module.py, line" in printed
    assert "Traceback" not in done.out + done.err


MISUSE = {
    "an unknown flag": ("mlp", ["--meshes=data=2"], "batches", ["meshes", "mesh"]),
    "a flag of another program": ("mlp", ["--preset=x"], "batches", ["--preset is not a flag"]),
    "no such function": ("nlp", [], "batches", ["no function 'nlp'", "mlp, with_dropout"]),
    "no such module": (
        "mlp",
        ["--model=other_module:mlp"],
        "batches",
        ["other_module", "cannot be imported from"],
    ),
    "a file": ("mlp", ["--model=user_module.py:mlp"], "batches", ["MODULE:FUNCTION", ".py"]),
    "a function that raises": (
        "raises",
        [],
        "batches",
        ["KeyError: 'key'", "user_module.py, line"],
    ),
    "no model": ("no_model", [], "batches", ["compiled keras.Model", "'model'"]),
    "not compiled": ("not_compiled", [], "batches", ["model.compile(optimizer, loss)"]),
    "one model for all": ("the_same", [], "batches", ["anew at each call"]),
    "no batches": ("mlp", [], "none", ["no batches"]),
    "batches that are none": ("mlp", [], "no_batches", ["iterable", "3"]),
    "rows that differ": ("mlp", [], "unlike", ["(2, 3), (3, 1)"]),
    "a mesh that does not fit": ("mlp", ["--mesh=data=16"], "batches", ["16", "8 CPU devices"]),
    "an axis that is not there": ("mlp", ["--mesh=heads=2"], "batches", ["heads=2", "tensor"]),
    "a mesh twice": ("mlp", ["--mesh=data=2", "--mesh=data=2"], "batches", ["twice"]),
    "no layout": ("mlp", ["--mesh=tensor=2"], "batches", ["no layout", "hidden/kernel"]),
    "a layout that does not fit": (
        "mlp",
        ["--mesh=tensor=3", "--layout_map=user_module:layouts"],
        "batches",
        ["axis tensor of size 3", "hidden/kernel"],
    ),
    "a layout for nothing": (
        "mlp",
        ["--mesh=tensor=2", "--layout_map=user_module:wrong_layouts"],
        "batches",
        ["'hiden/kernel' matches no variable", "hidden/kernel"],
    ),
    "a stage without its axis": (
        "mlp",
        ["--mesh=fsdp=2", "--zero_stage=1"],
        "batches",
        ["zero_stage=1", "data=2"],
    ),
    "a dtype": ("mlp", ["--dtype=float8"], "batches", ["float8", "float64"]),
    "a tolerance": ("mlp", ["--tolerance=-1"], "batches", ["tolerance", "-1"]),
    "no steps": ("mlp", ["--steps=0"], "batches", ["--steps", "0"]),
    "json": ("mlp", ["--json=no/such/out.json"], "batches", ["--json", "does not exist"]),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case, program, tmp_path):
    """Fails for a traceback, another exit status, or an answer that does not name what is wrong."""
    model, arguments, batches, words = MISUSE[case]
    done = program(model, *arguments, batches=batches)
    assert done.status == 2, done.out
    assert done.err.startswith("llmos-verify: ")
    assert len(done.err.strip().splitlines()) == 1
    assert [word for word in words if word not in done.err] == []
    assert done.out == ""


def test_what_has_to_be_given(run_program):
    """Fails if a program without functions ends in a traceback, or does not say what it needs."""
    done = run_program(verify)
    assert (done.status, "--model=MODULE:FUNCTION is missing" in done.err) == (2, True)
