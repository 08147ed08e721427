"""llmos-plan: what it prints and leaves, and what it refuses."""

import json

import pytest

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
        (["--draw_schedule=1f1b", "--stages=-2"], "--stages is at least 1. Received: -2"),
        (["--draw_schedule=1f1b", "--microbatches=0"], "--microbatches is at least 1"),
        (["--draw_schedule=interleaved"], "num_chunks=1"),
        (["--draw_schedule=1f1b", "--png=no/such.png"], "--png=no/such.png: the folder"),
        (["--draw_schedule=1f1b", "--png=it.txt"], "--png=it.txt is not the name of a .png"),
        (["--draw_schedule=1f1b", "--json=no/such.json"], "--json=no/such.json: the folder"),
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


def test_help_is_enough_to_start(run_plan):
    """Fails if help lacks an example, or a flag of the program."""
    status, out, _ = run_plan("--help")
    assert status == 0
    assert "    llmos-plan --draw_schedule=1f1b\n" in out
    assert [name for name in plan._FLAGS if f"--{name}\n" not in out] == []
    assert max(map(len, out.splitlines())) <= 100


def test_it_tells_the_memory_of_a_mesh_that_is_not_there(run_plan, tmp_path):
    """Fails if the table is not the estimate's, or a plan needs the devices that it is for."""
    arguments = ("--preset=llama2_7b", "--mesh=fsdp=64,pipe=2", "--zero_stage=3")
    status, out, err = run_plan(*arguments, "--global_batch=128", "--json=out.json")
    assert (status, err) == (0, "")
    result = json.loads((tmp_path / "out.json").read_text())
    # 6.74e9 weights in float32, and twice as many numbers of AdamW's, over 128 devices.
    state = sum(stage["parameters"] + stage["optimizer"] for stage in result["stages"])
    assert state * 64 == pytest.approx(12 * 6738415616, rel=0.001)
    assert f"{result['stages'][0]['parameters']:,}" in out
    whole = out
    status, out, _ = run_plan(*arguments, "--global_batch=128", "--offload=optimizer")
    assert status == 0
    # Two numbers of 4 bytes for each weight of a device, and two scalars.
    assert f"{2 * result['stages'][0]['parameters'] + 12:,}" in out.splitlines()[-1]
    assert "on the host" in out.splitlines()[-1]
    status, out, _ = run_plan(*arguments, "--global_batch=128", "--rematerialise=block")
    assert status == 0
    # Less than is kept otherwise, of the same state.
    kept, again = (int(_row(text, "activations")[1].replace(",", "")) for text in (whole, out))
    assert again < kept / 4
    assert _row(out, "optimizer") == _row(whole, "optimizer")
    status, out, err = run_plan(*arguments, "--global_batch=128", "--rematerialise=5000")
    assert status == 2
    assert "none, full, block, selective" in err
    status, out, err = run_plan("--mesh=data=3", "--global_batch=8")
    assert status == 2
    assert "global_batch=8" in err


def _row(table, kind):
    """The words of a table's line of a kind."""
    return next(line.split() for line in table.splitlines() if line.startswith(kind))
