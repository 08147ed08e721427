"""llmos-plan: what it prints and leaves, and what it refuses."""

import json

import pytest

from llmos_tf import memory
from llmos_tf.mesh import Mesh
from llmos_tf.models import get_preset
from llmos_tf.planning.memory_model import HOST, KINDS
from llmos_tf.scripts import plan
from llmos_tf.scripts.flags import FLAGS

pytestmark = pytest.mark.fast


@pytest.fixture
def run_plan(monkeypatch, capsys, tmp_path):
    """(*arguments) -> exit status, stdout, stderr; in an empty folder."""

    def run(*arguments):
        FLAGS.unparse_flags()
        for name in FLAGS:
            if FLAGS[name].present:
                FLAGS[name].unparse()
        monkeypatch.setattr("sys.argv", ["llmos-plan", *arguments])
        with pytest.raises(SystemExit) as end:
            plan.run()
        return end.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    yield run
    FLAGS.unparse_flags()
    FLAGS(["pytest"])


def test_it_draws_and_counts(run_plan, tmp_path):
    """Fails if the figures are not those of the schedule, or the picture is not where it says."""
    arguments = ("--draw_schedule=zb-h1", "--stages=4", "--microbatches=8", "--json=out.json")
    status, out, err = run_plan(*arguments)
    assert (status, err) == (0, "")
    assert "zb-h1: 4 stages, 8 microbatches" in out
    assert "\nstage 3  ·  ·  ·  F0 B0" in out
    assert "bubble: 11.11% of" in out
    assert "by formula 11.11%: (p-1)/(3m+p-1) with p=4, m=8" in out
    assert "stages 0 to 3, in those of one microbatch in one stage: 4, 4, 4, 4\n" in out
    assert "step: 27 " in out
    assert "(1f1b 33, without any waiting 24)" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 100
    assert out.endswith("picture: schedule-zb-h1-4x8.png\n")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / result.pop("png")).read_bytes().startswith(b"\x89PNG")
    rows = result.pop("rows")
    assert rows[0] == [["F", 0, 0], None, None, None]
    assert result == {
        "schedule": "zb-h1",
        "stages": 4,
        "microbatches": 8,
        "num_chunks": 1,
        "bubble_share": pytest.approx(1 / 9),
        "bubble_formula": "(p-1)/(3m+p-1)",
        "bubble_share_by_formula": pytest.approx(1 / 9),
        "peak_live_activations": [4, 4, 4, 4],
        "step_time": 27.0,
        "step_time_1f1b": 33.0,
        "step_time_without_waiting": 24.0,
    }


def test_a_name_is_enough(run_plan, tmp_path):
    """Fails if a schedule cannot be looked at without knowing its numbers, or --png has no
    effect."""
    status, out, _ = run_plan("--draw_schedule=1f1b", "--png=it.png")
    assert (status, [path.name for path in tmp_path.iterdir()]) == (0, ["it.png"])
    assert "1f1b: 4 stages, 8 microbatches" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Give --draw_schedule=1f1b"),
        (["--draw_schedule=zbv"], "zb-h1, zb-v. Received: 'zbv'"),
        (["--draw_schedule=1f1b", "--stages=1"], "at least 2 stages"),
        (["--draw_schedule=1f1b", "--stages=-2"], "--stages must be at least 1. Received: -2"),
        (["--draw_schedule=1f1b", "--microbatches=0"], "--microbatches must be at least 1"),
        (["--draw_schedule=interleaved"], "num_chunks=1"),
        (["--draw_schedule=1f1b", "--png=no/such.png"], "--png=no/such.png: the folder"),
        (["--draw_schedule=1f1b", "--png=it.txt"], "--png=it.txt is not the name of a .png"),
        (["--draw_schedule=1f1b", "--json=no/such.json"], "--json=no/such.json: the folder"),
        (["--mesh=data=2", "--dtype=float16"], "mixed_bfloat16. Received: 'float16'"),
        (["--mesh=data=2", "--device_memory=lots"], "such as 80GB (10⁹ bytes) or 24GiB"),
        (["--mesh=data=2", "--device_memory=0GB"], "Received: '0GB'"),
        (["--mesh=data=2", "--seq_len=129"], "--seq_len=129 is more than the 128 positions"),
        (["--mesh=data=2", "--reshard_after_forward"], "which has size 1 in the mesh"),
        (["--draw_schedule=1f1b", "--steps=5"], "--steps is not a flag of this program"),
    ],
)
def test_what_it_refuses(arguments, words, run_plan, tmp_path):
    """Fails for a traceback, another exit status, an answer that does not say what would work, or
    a file that is left behind."""
    status, out, err = run_plan(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("llmos-plan: ")
    assert len(err.strip().splitlines()) == 1
    assert words in err
    assert list(tmp_path.iterdir()) == []


LLAMA = ("--preset=llama2_7b", "--mesh=fsdp=64,pipe=2", "--global_batch=128")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--zero_stage=3", "--offload=optimizer"], {"zero_stage": 3, "offload": "optimizer"}),
        (["--rematerialise=block", "--microbatches=2"], {"rematerialise": "block"}),
        (["--dtype=mixed_bfloat16", "--seq_len=64"], {"dtype_policy": "mixed_bfloat16"}),
        (
            ["--mesh=fsdp=8", "--reshard_after_forward"],
            {"mesh": Mesh(fsdp=8), "reshard_after_forward": True},
        ),
    ],
)
def test_it_prints_the_estimate(flags, options, run_plan, tmp_path):
    """Fails if a flag does not reach the estimate, the table is not that of the JSON, or the run
    that is planned is not named."""
    status, out, err = run_plan(*LLAMA, *flags, "--json=out.json")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "out.json").read_text())
    seq_len = 64 if "--seq_len=64" in flags else 4096
    values = {"mesh": Mesh(fsdp=64, pipe=2), "global_batch": 128, "seq_len": seq_len} | options
    mesh = values.pop("mesh")
    rows = memory.estimate(get_preset("llama2_7b"), mesh, **values)
    by_stage = {mesh.coordinate(rank)["pipe"]: row for rank, row in enumerate(rows)}
    for stage, row in by_stage.items():
        assert result["stages"][stage] == {kind: row[kind] for kind in (*KINDS, HOST)}
        for kind in KINDS:
            assert _row(out, kind)[1 + stage] == f"{row[kind] / 1e9:,.2f}"
    assert "6,738,415,616 parameters" in out
    assert f"128 sequences of {seq_len:,} tokens" in out
    assert result["dtype"] in out
    assert ("on the host" in out) == ("--offload=optimizer" in flags)
    assert ("changes nothing here" in out) == ("--zero_stage=3" in flags)


def test_small_models_have_small_units(run_plan):
    """Fails if the table of a model for laptops is zeros."""
    status, out, _ = run_plan("--mesh=data=2")
    assert status == 0
    assert "in MB" in out
    assert float(_row(out, "total")[1]) > 10


@pytest.mark.parametrize(
    ("arguments", "fits", "expected"),
    [
        (["--mesh=data=2", "--device_memory=1GB"], True, []),
        # 26 GB of weights and twice as much of AdamW's state: sharded eight times it fits.
        (
            [*LLAMA[:1], "--mesh=data=8", "--global_batch=8", "--device_memory=80GB"],
            False,
            ["--zero_stage=1"],
        ),
        # Not by one flag: by several together.
        ([*LLAMA[:1], "--mesh=tensor=8", "--global_batch=64", "--device_memory=40GiB"], False, []),
    ],
)
def test_what_would_make_it_fit(arguments, fits, expected, run_plan, tmp_path):
    """Fails if a run that does not fit is said to fit, or what is offered does not fit either."""
    status, out, err = run_plan(*arguments, "--json=out.json")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["fits"] == fits
    assert out.split("\n\n")[-1].startswith("Fits" if fits else "Does not fit")
    assert bool(result["changes"]) != fits
    for flags, needed in result["changes"]:
        assert f"  {flags} " in out
        status, out_with, _ = run_plan(*arguments, *flags.split(), "--json=with.json")
        assert status == 0, flags
        assert "\nFits: " in out_with, flags
        assert json.loads((tmp_path / "with.json").read_text())["needed_bytes"] == needed
    offered = " ".join(flags for flags, _ in result["changes"])
    assert [flag for flag in expected if flag not in offered] == []


def _row(table, kind):
    """The words of a table's line of a kind."""
    return next(line.split() for line in table.splitlines() if line.startswith(kind))
