"""The programs, end to end: train, resume, evaluate, generate, and what they refuse.

The run that most tests read has a tokenizer of its own, of 8,000 tokens. Runs of bytes are in
`test_a_signal_saves_and_ends` and in tests of single programs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from safetensors.numpy import load_file

from llmos_tf.scripts import evaluate, generate, train
from llmos_tf.scripts.programs import train as work
from llmos_tf.training.flops import describe_peak

pytestmark = pytest.mark.graph_optimizer

# Eight virtual devices are there for all tests; a program may use fewer.
COMMON = ("--virtual_devices=8",)
SMALL = (
    *(*COMMON, "--preset=gpt_mini", "--mesh=data=2,tensor=2", "--global_batch=4", "--seq_len=16"),
    *("--save_every=3", "--steps=6"),
)
NUM_TOKENS = 8000


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words from all over the vocabulary of 8,000."""
    folder = tmp_path_factory.mktemp("text")
    for index in range(4):
        words = " ".join(f"word{347 * ((index * 7 + k * k) % 23)}" for k in range(80))
        (folder / f"{index}.txt").write_text(words)
    return f"--data={folder}/*.txt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of 8,000 tokens, one a word."""
    path = tmp_path_factory.mktemp("tokenizer") / "own.json"
    words = {f"word{i}": i for i in range(NUM_TOKENS - 1)} | {"</s>": NUM_TOKENS - 1}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return f"--tokenizer={path}"


@pytest.fixture(scope="module")
def trained(text, tokenizer, tmp_path_factory):
    """Folder of a run of six steps, and its flags."""
    workdir = tmp_path_factory.mktemp("run") / "six"
    return workdir, (*SMALL, text, tokenizer, f"--workdir={workdir}")


@pytest.fixture
def finished(trained, run_program):
    """The run, done once."""
    workdir, arguments = trained
    if not workdir.exists():
        done = run_program(train, *arguments)
        assert done.status == 0, done.err
        (workdir / "printed.txt").write_text(done.out)
    return workdir


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_leaves_what_it_says(finished):
    """Fails for a missing file, a step without its line, or a summary that is another run's."""
    assert [row["step"] for row in metrics(finished)] == [1, 2, 3, 4, 5, 6]
    keys = {"step", "loss", "learning_rate", "seconds", "tokens_per_second", "mfu"}
    assert all(set(row) == keys for row in metrics(finished))
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    steps = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert steps == ["step-00000003", "step-00000006"]
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["steps"], summary["mesh"]) == (6, "data=2,tensor=2")
    assert 0 < summary["bits_per_byte"] < 9
    printed = (finished / "printed.txt").read_text()
    sent = "In a step each device sends"
    for words in ("5,289,472 parameters", "bits per byte", "a bigram model", "Continuation:", sent):
        assert words in printed
    # The baseline is of bytes, whatever the tokens are.
    assert 0 < summary["bigram_bits_per_byte"] < 8
    # Utilisation says of what.
    peak = describe_peak(summary["peak_flops"], summary["peak_source"])
    assert f"{summary['mfu']:.1%} of {peak}" in printed


def test_resume_goes_on_bit_for_bit(finished, trained, tmp_path, run_program):
    """Fails if a run that was interrupted needs its flags again, repeats or skips data, forgets
    optimizer state, or restarts the schedule: then losses after the resume, or the weights, differ
    in some bit."""
    workdir = tmp_path / "resumed"
    arguments = [a for a in trained[1] if not a.startswith("--workdir")]

    def after_three(run, step, *more):
        save(run, step, *more)
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    save = work._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "_save", after_three)
        done = run_program(train, *arguments, f"--workdir={workdir}")
    assert done.status == 0, done.err
    assert f"--workdir={workdir} --resume" in done.out
    assert [row["step"] for row in metrics(workdir)] == [1, 2, 3]
    done = run_program(train, "--resume", f"--workdir={workdir}")
    assert done.status == 0, done.err
    whole, resumed = metrics(finished), metrics(workdir)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    name = "checkpoints/step-00000006/model.safetensors"
    weights, expected = load_file(workdir / name), load_file(finished / name)
    assert set(weights) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(weights[key], value, key)
    done = run_program(train, "--resume", f"--workdir={workdir}")
    assert (done.status, "Nothing is left to train" in done.out) == (0, True)


def test_evaluate_takes_what_the_checkpoint_says(finished, tmp_path, run_program):
    """Fails if other tokens, another text or another length is measured than was trained on, or
    the mesh, the padding of the last batch or the batch size moves the figure."""
    out = tmp_path / "out.json"
    summary = json.loads((finished / "summary.json").read_text())
    done = run_program(
        evaluate,
        *COMMON,
        f"--checkpoint={finished}",
        "--mesh=fsdp=2",
        "--global_batch=6",
        f"--json={out}",
    )
    assert (done.status, "Note" in done.err) == (0, False), done.err
    result = json.loads(out.read_text())
    # float32 sums over another mesh.
    assert result["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-5)
    assert result["bigram_bits_per_byte"] == summary["bigram_bits_per_byte"]
    assert f"{result['bits_per_byte']:.3f} bits per byte" in done.out


def test_generate_says_the_same_on_every_mesh(finished, tmp_path, run_program):
    """Fails if sampling depends on the mesh, the tokenizer is not that of the run, or the prompt or
    the new text is lost."""
    texts = {}
    # By default the mesh of the run.
    for mesh in ((), ("--mesh=1", *COMMON)):
        out = tmp_path / "out.json"
        done = run_program(
            generate,
            f"--checkpoint={finished}/checkpoints/step-00000003",
            *mesh,
            "--prompt=word347 ",
            "--max_new_tokens=8",
            "--seed=5",
            f"--json={out}",
        )
        assert done.status == 0, done.err
        result = json.loads(out.read_text())
        assert result["prompt"] == "word347 "
        assert result["tokens"][0] == 347
        assert result["text"].startswith("word")
        assert done.out == f"word347 {result['text']}\n"
        texts[mesh] = result["tokens"]
    first, second = texts.values()
    assert first == second
    assert len(first) <= 1 + 8


# What a person gets wrong, and the words that must be in the one paragraph of the answer.
TRAIN_MISUSE = {
    "unknown flag": (["--stepz=3"], ["stepz", "steps"]),
    "a value that is no number": (["--steps=many"], ["steps", "many"]),
    "an argument that is no flag": (["three"], ["three", "--name=value"]),
    "a flag of another program": (["--prompt=x"], ["--prompt", "not a flag of this program"]),
    "unknown preset": (["--preset=gpt_tinny"], ["gpt_tinny", "gpt_tiny"]),
    "unknown axis": (["--mesh=data=2,heads=2"], ["heads=2", "tensor"]),
    "more ranks than devices": (["--mesh=data=16", "--global_batch=16"], ["16", "8 CPU devices"]),
    "heads": (["--mesh=tensor=3"], ["tensor", "of size 3", "divide"]),
    "batch": (["--mesh=data=3", "--global_batch=4"], ["--global_batch=4", "multiple of 3"]),
    "zero stage": (["--mesh=tensor=2", "--zero_stage=1"], ["zero_stage=1", "data"]),
    "missing data": (["--data=no/such/*.txt"], ["no/such/*.txt", "nothing"]),
    "missing tokenizer": (["--tokenizer=no/such.json"], ["no/such.json", "tokenizer"]),
    "long sequences": (["--seq_len=129"], ["--seq_len=129", "128"]),
    "resume nothing": (["--resume", "--workdir=no_such_run"], ["no checkpoint", "no_such_run"]),
    "json": (["--json=no/such/out.json"], ["--json", "does not exist"]),
}


@pytest.mark.parametrize("case", TRAIN_MISUSE)
def test_train_refuses(case, tmp_path, monkeypatch, run_program):
    """Fails for a traceback, another exit status, an answer that does not name what was received,
    or a file that is left behind."""
    monkeypatch.chdir(tmp_path)
    arguments, words = TRAIN_MISUSE[case]
    done = run_program(train, *COMMON, *arguments)
    assert done.status == 2
    assert done.err.startswith("llmos-train: ")
    assert len(done.err.strip().splitlines()) == 1
    assert [word for word in words if word not in done.err] == []
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_files_that_are_not_what_they_should_be(tmp_path, text, run_program):
    """Fails for an empty corpus, a file that is no tokenizer, or a vocabulary that does not fit,
    which are trained on, or end in a traceback."""
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"model": 3}')
    large = tmp_path / "large.json"
    words = {f"w{i}": i for i in range(300)} | {"</s>": 300}
    hf.Tokenizer(hf.models.WordLevel(words, unk_token="w0")).save(str(large))
    workdir = f"--workdir={tmp_path / 'run'}"
    for arguments, expected in [
        ([f"--data={empty}"], "is empty"),
        ([text, f"--tokenizer={wrong}"], "wrong.json"),
        ([text, f"--tokenizer={large}"], "has 301 tokens, and the model has only 256"),
        ([text, f"--tokenizer={large}"], "gpt_mini (8,192)"),
        ([text, f"--workdir={empty}"], "is a file"),
    ]:
        done = run_program(train, *COMMON, workdir, *arguments)
        assert (done.status, expected in done.err) == (2, True), done.err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(finished, trained, run_program):
    """Fails if a second run in the same folder destroys the first one."""
    done = run_program(train, *trained[1])
    assert done.status == 2
    assert "holds a run already" in done.err


def test_what_does_not_fit_a_checkpoint(finished, trained, text, tmp_path, run_program):
    """Fails if another model, or a text that has changed, is trained on, or the refusal is a
    traceback."""
    done = run_program(train, *trained[1], "--preset=llama_tiny", "--resume")
    assert done.status == 2
    assert "--preset=gpt_mini. Received: --preset=llama_tiny" in done.err
    nothing = run_program(evaluate, *COMMON, text, f"--checkpoint={finished}/no_such")
    assert (nothing.status, "no_such" in nothing.err) == (2, True)
    which = run_program(generate, *COMMON, "--prompt=a")
    assert (which.status, "--checkpoint" in which.err) == (2, True)
    prompt = f"--prompt={'word1 ' * 200}"
    long = run_program(generate, *COMMON, f"--checkpoint={finished}", "--mesh=1", prompt)
    assert (long.status, "128 positions" in long.err) == (2, True)
    file = Path(text.removeprefix("--data=")).with_name("0.txt")
    before = file.read_text()
    try:
        file.write_text(before + " word1")
        done = run_program(train, "--resume", f"--workdir={finished}", "--steps=7")
    finally:
        file.write_text(before)
    assert done.status == 2
    assert "has changed since the checkpoint" in done.err


def test_a_signal_saves_and_ends(text, tmp_path):
    """Fails if SIGTERM kills the run, loses a step, or ends it with an error; or if notes of
    TensorFlow are printed among the program's own lines."""
    workdir = tmp_path / "run"
    arguments = ["--mesh=1", "--global_batch=4", "--seq_len=16", "--steps=100000", text]
    command = [sys.executable, "-m", "llmos_tf.scripts.train", *arguments, f"--workdir={workdir}"]
    # As a user starts it: tests have a level of logging of their own.
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        try:
            end = time.monotonic() + 120
            while not (workdir / "metrics.jsonl").exists() or len(metrics(workdir)) < 3:
                assert process.poll() is None, process.stderr.read().decode()
                assert time.monotonic() < end
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err.decode()
    last = metrics(workdir)[-1]["step"]
    assert f"Stopped after step {last}" in out.decode()
    assert f"--workdir={workdir} --resume" in out.decode()
    assert "SIGTERM received" in out.decode()
    # Nothing of TensorFlow's: only the bar.
    lines = err.decode().replace("\r", "\n").splitlines()
    assert [line for line in lines if line.strip() and "step" not in line] == []
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{last:08d}"
    assert (workdir / "curves.png").exists()
