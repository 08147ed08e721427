"""The runs of llmos-benchmark: how they are written, and what is refused before any is started."""

import pytest

from llmos_tf.scripts.benchmark_options import BenchmarkOptions, Candidate
from llmos_tf.scripts.flags import FLAGS
from llmos_tf.scripts.peers import kinds

pytestmark = pytest.mark.fast


def options(*run, **changed):
    values = {name: FLAGS[name].default for name in BenchmarkOptions.__dataclass_fields__}
    return BenchmarkOptions(**values | {"run": run, "ratio": (), "seq_len": 128} | changed)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", ("step", 1, {"num_microbatches": 1})),
        ("data=2,tensor=2:zero_stage=1", ("step", 4, {"zero_stage": 1, "num_microbatches": 1})),
        (
            "data=2:rematerialise=block,bucket_bytes=1000000",
            (
                "step",
                2,
                {"rematerialise": "block", "bucket_bytes": 1_000_000, "num_microbatches": 1},
            ),
        ),
        ("fit:1", ("fit", 1, {"num_microbatches": 1})),
        ("fit:pipe=2:microbatches=4", ("fit", 2, {"num_microbatches": 4})),
        ("keras", ("keras", 1, {})),
        ("mirrored=4:jit", ("mirrored", 4, {"jit": True})),
        ("torch-pipe=2", ("torch-pipe", 2, {"microbatches": 2})),
        ("torch-pipe=2:microbatches=8", ("torch-pipe", 2, {"microbatches": 8})),
    ],
)
def test_a_run(text, expected):
    """Fails if what a run says does not reach its processes."""
    found = Candidate.parse(text)
    assert (found.kind, found.devices, found.options) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pytorch=2", "no kind of run. Ours are a mesh of pipe, data"),
        ("", "no kind of run"),
        ("keras=2", "It is written keras[:jit]"),
        ("mirrored", "It is written mirrored=N[:jit]"),
        ("torch-ddp=0", "It is written torch-ddp=N[:compile]"),
        ("torch-ddp=2,tensor=2", "It is written torch-ddp=N[:compile]"),
        ("torch:jit", "'jit' does not fit: it is written torch[:compile]"),
        ("torch-pipe=2:microbatches", "'microbatches' does not fit"),
        ("torch-pipe=2:microbatches=0", "'microbatches=0' does not fit"),
        ("torch:compile=0", "'compile=0' does not fit"),
        ("data=2:jit", "after the mesh come schedule"),
        ("data=3", "--global_batch=16 is cut into 3 parts by --run=data=3"),
        ("torch-ddp=3", "--run=torch-ddp=3: --global_batch=16 is cut into 3 parts"),
        ("torch-pipe=2:microbatches=3", "--global_batch=16 is cut into 3 parts"),
        ("jax-tensor=3", "--num_heads=8 is cut into 3 parts"),
        ("torch-pipe=8", "8 stages need as many blocks"),
    ],
)
def test_what_is_no_run(text, words):
    """Fails if a run that cannot be is found only when the others have been timed, or an unknown
    one is refused without a list of those that there are."""
    with pytest.raises(ValueError, match="--run=") as error:
        options("1", text)
    assert words in str(error.value)
    if "no kind" in words:
        assert all(kinds.form(name) in str(error.value) for name in kinds.KINDS)


def test_the_same_run_twice():
    """Fails if the second of two equal runs cannot be told from the first, in rows or ratios."""
    given = options("1", "data=2", "1", "1", ratio=("1#2/1", "data=2/1#3"))
    assert [one.name for one in given.candidates] == ["1", "data=2", "1#2", "1#3"]
    assert given.pairs == [("1#2", "1"), ("data=2", "1#3")]
    with pytest.raises(ValueError, match=r"--ratio=data=4/1 is RUN/RUN, of two of the runs 1, da"):
        options("1", "data=2", ratio=("data=4/1",))


def test_a_package_that_is_not_there(monkeypatch):
    """Fails if a missing package is found by the failure of a process, or is looked for where it
    is not needed."""
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda name: None)
    assert kinds.KINDS["torch-ddp"].missing().startswith("torch is not installed: pip install")
    assert kinds.KINDS["jax"].missing().startswith("jax is not installed")
    assert kinds.KINDS["mirrored"].missing() is None


def test_the_backend_of_a_process(monkeypatch):
    """Fails if a backend of the user's environment reaches a run of another one, or flags of the
    user's are lost."""
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine")
    assert kinds.environment("step", 2)["KERAS_BACKEND"] == "tensorflow"
    assert kinds.environment("mirrored", 2)["KERAS_BACKEND"] == "tensorflow"
    jax = kinds.environment("jax-data", 2)
    assert jax["KERAS_BACKEND"] == "jax"
    assert jax["XLA_FLAGS"] == "--xla_mine --xla_force_host_platform_device_count=2"
