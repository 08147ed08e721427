"""What all programs have in common: help, refusals, and a start without TensorFlow."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmos_tf.models import PRESETS
from llmos_tf.scripts import benchmark, evaluate, generate, plan, train, verify
from llmos_tf.scripts.flags import FLAGS

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = {
    f"llmos-{module.__name__.rpartition('.')[2]}": module
    for module in (benchmark, evaluate, generate, plan, train, verify)
}


@pytest.fixture
def run_program(monkeypatch, capsys, tmp_path):
    """(name, *arguments) -> exit status, stdout, stderr; in an empty folder."""

    def run(name, *arguments):
        FLAGS.unparse_flags()
        for flag in FLAGS:
            if FLAGS[flag].present:
                FLAGS[flag].unparse()
        monkeypatch.setattr("sys.argv", [name, *arguments])
        with pytest.raises(SystemExit) as end:
            PROGRAMS[name].run()
        return end.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    # Help sets another one.
    handler = signal.getsignal(signal.SIGPIPE)
    yield run
    signal.signal(signal.SIGPIPE, handler)
    FLAGS.unparse_flags()
    FLAGS(["pytest"])


# Run in a process of its own: calls of programs, and what the process has imported then.
WITHOUT_TENSORFLOW = """
import contextlib, importlib, io, json, sys, time
from absl import flags
calls, statuses, seconds = json.loads(sys.argv[1]), [], []
for program, *arguments in calls:
    begin = time.process_time()
    module = importlib.import_module(f"llmos_tf.scripts.{program}")
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
        if flags.FLAGS[name].present:
            flags.FLAGS[name].unparse()
    sys.argv = [f"llmos-{program}", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            module.run()
        except SystemExit as end:
            statuses.append(end.code or 0)
    seconds.append(time.process_time() - begin)
heavy = sorted({name.split(".")[0] for name in sys.modules} & {"tensorflow", "keras", "torch"})
print(json.dumps([statuses, heavy, max(seconds)]))
"""


def test_help_errors_and_plans_need_no_tensorflow(tmp_path):
    """Fails if an import makes a user wait seconds for help, an error in a flag or a plan."""
    names = [name.removeprefix("llmos-") for name in PROGRAMS]
    helps = [[name, "--help"] for name in names]
    unknown = [[name, "--no_such_flag"] for name in names]
    errors = [
        ["train", "--mesh=tensor=2", "--zero_stage=1"],
        ["train", "--seq_len=1000"],
        ["train", "--preset=gpt_tinny"],
        ["train", "--resume"],
        ["evaluate", "--checkpoint=missing"],
        ["generate", "--prompt=x"],
        ["verify", "--model=a:b"],
        ["benchmark", "--run=abc"],
        ["plan", "--mesh=data=3", "--global_batch=8"],
    ]
    plans = [
        ["plan", "--preset=llama2_7b", "--mesh=fsdp=8", "--device_memory=80GB"],
        ["plan", "--draw_schedule=1f1b"],
    ]
    calls = helps + unknown + errors + plans
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, json.dumps(calls)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    statuses, heavy, longest = json.loads(done.stdout)
    expected = [0] * len(helps) + [2] * (len(unknown) + len(errors)) + [0] * len(plans)
    assert list(zip(calls, statuses, strict=True)) == list(zip(calls, expected, strict=True))
    assert heavy == []
    # Processor time, which a busy machine does not change much. The first one imports numpy.
    assert longest < 1.0


def test_help_in_any_terminal(tmp_path):
    """Fails if a character that a terminal lacks, or a pipe that is closed, ends in a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "llmos_tf.scripts.verify", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u0394" in done.stdout
    # Nor is a reader who has read enough.
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "llmos_tf.scripts.train", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    os.close(write)
    assert done.stderr == b""


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_of_this_program(name, run_program):
    """Fails if help lacks an example or a flag, or mentions a flag or a program that it is not the
    help of."""
    status, out, _ = run_program(name, "--help")
    assert status == 0
    about, _, flags = out.partition("\nFlags:\n")
    assert f"    {name}" in about
    listed = re.findall(r"^  --(\w+)$", flags, re.MULTILINE)
    assert tuple(listed) == PROGRAMS[name].PROGRAM.flags
    assert set(re.findall(r"--(\w+)", out)) - {"pre"} <= set(listed)
    assert set(re.findall(r"llmos-\w+", out)) == {name}
    assert max(map(len, out.splitlines())) <= 100
    assert set(PROGRAMS[name].PROGRAM.help) <= set(listed)


def test_help_lists_the_presets(run_program):
    """Fails if a user has to read the source to find a model for a tokenizer or a length."""
    for name in ("llmos-train", "llmos-plan"):
        _, out, _ = run_program(name, "--help")
        for preset, config in PRESETS.items():
            (line,) = (line for line in out.splitlines() if line.split()[:1] == [preset])
            counts = (config.num_parameters(), config.vocab_size, config.max_positions)
            assert line.split()[1:] == [f"{count:,}" for count in counts]


@pytest.mark.parametrize(
    ("name", "flag", "offered"),
    [
        ("llmos-train", "--stepz", ["--steps"]),
        ("llmos-train", "--noresumee", ["--noresume", "--resume"]),
        ("llmos-evaluate", "--steps", []),
        ("llmos-generate", "--promt=x", ["--prompt"]),
        ("llmos-plan", "--alsologtostder", []),
        ("llmos-train", "--prompt=x", []),
    ],
)
def test_an_unknown_flag(name, flag, offered, run_program):
    """Fails if a flag is offered that the program would refuse in turn."""
    status, out, err = run_program(name, flag)
    assert (status, out) == (2, "")
    assert f"{flag.partition('=')[0]} is not a flag of this program" in err
    hint = err.partition("Did you mean ")[2].partition("?")[0]
    found = re.findall(r"--\w+", hint)
    assert [flag for flag in offered if flag not in found] == []
    known = PROGRAMS[name].PROGRAM.flags
    assert all(flag[2:].removeprefix("no") in known or flag[2:] in known for flag in found)


CLUSTER = {"cluster": {"worker": ["localhost:1", "localhost:2"]}, "task": {"type": "worker"}}


def test_a_cluster_is_refused(run_program, monkeypatch):
    """Fails if a program of one process runs once in each process of a cluster, each with all the
    work and the same files, or a plan needs a machine of its own."""
    monkeypatch.setenv("TF_CONFIG", json.dumps(CLUSTER))
    for name in PROGRAMS:
        if name == "llmos-plan":
            assert run_program(name, "--mesh=data=2")[0] == 0
            continue
        status, out, err = run_program(name)
        assert (status, out) == (2, "")
        for words in ("TF_CONFIG", "2 processes (2 worker)", "Unset TF_CONFIG"):
            assert words in err
    monkeypatch.setenv("TF_CONFIG", "{'cluster'")
    assert "TF_CONFIG cannot be read" in run_program("llmos-evaluate")[2]
    # One process, as some launchers set it up.
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"chief": ["localhost:1"]}}))
    assert "Give --checkpoint=PATH" in run_program("llmos-evaluate")[2]
