"""The programs, end to end: train, resume, evaluate, generate, and what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as hf
from safetensors.numpy import load_file

from llmos_tf.files.locking import claimed
from llmos_tf.scripts import evaluate, generate, train

pytestmark = pytest.mark.graph_optimizer

# Eight virtual devices are there for all tests; a program may use fewer.
COMMON = ("--virtual_devices=8",)
SMALL = (*COMMON, "--mesh=data=2,tensor=2", "--global_batch=4", "--seq_len=16", "--save_every=3")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for index in range(4):
        words = " ".join(f"word{(index * 7 + k * k) % 23}" for k in range(80))
        (folder / f"{index}.txt").write_text(words)
    return f"--data={folder}/*.txt"


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """Work folder of a run of six steps."""
    workdir = tmp_path_factory.mktemp("run") / "six"
    return workdir, (*SMALL, text, "--steps=6", f"--workdir={workdir}")


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
    for words in ("842,496 parameters", "bits per byte", "a bigram model", "Continuation:", sent):
        assert words in printed


def test_resume_goes_on_bit_for_bit(finished, trained, text, tmp_path, run_program):
    """Fails if a resumed run repeats or skips data, forgets optimizer state, or restarts the
    schedule: then losses after the resume, or the weights, differ in some bit."""
    workdir = tmp_path / "resumed"
    arguments = [a for a in trained[1] if not a.startswith("--workdir")]
    arguments.append(f"--workdir={workdir}")

    class Interrupted(Exception):
        pass

    def after_three(run, step):
        train_save(run, step)
        if step == 3:
            raise Interrupted

    train_save = train._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_save", after_three)
        with pytest.raises(Interrupted):
            run_program(train, *arguments)
    assert [row["step"] for row in metrics(workdir)] == [1, 2, 3]
    # A newer checkpoint, which is damaged: the run says so, and takes the older one.
    damaged = workdir / "checkpoints" / "step-00000005"
    shutil.copytree(workdir / "checkpoints" / "step-00000003", damaged)
    os.truncate(damaged / "optimizer.safetensors", 1000)
    done = run_program(train, *arguments, "--resume")
    assert done.status == 0, done.err
    assert f"Skipped the damaged checkpoint step-00000005: The file {damaged}/optim" in done.err
    whole, resumed = metrics(finished), metrics(workdir)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    name = "checkpoints/step-00000006/model.safetensors"
    weights, expected = load_file(workdir / name), load_file(finished / name)
    assert set(weights) == set(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(weights[key], value, key)


def test_evaluate_on_another_mesh(finished, text, tmp_path, run_program):
    """Fails if the mesh, the padding of the last batch or the batch size moves the figure."""
    out = tmp_path / "out.json"
    summary = json.loads((finished / "summary.json").read_text())
    done = run_program(
        evaluate,
        *COMMON,
        f"--checkpoint={finished}",
        text,
        "--seq_len=16",
        "--mesh=fsdp=2",
        "--global_batch=6",
        f"--json={out}",
    )
    assert done.status == 0, done.err
    result = json.loads(out.read_text())
    # float32 sums over another mesh.
    assert result["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-5)
    assert f"{result['bits_per_byte']:.3f} bits per byte" in done.out


def test_generate_says_the_same_on_every_mesh(finished, tmp_path, run_program):
    """Fails if sampling depends on the mesh, or the prompt or the new text is lost."""
    texts = {}
    for mesh in ("1", "tensor=2"):
        out = tmp_path / f"{mesh}.json"
        done = run_program(
            generate,
            *COMMON,
            f"--checkpoint={finished}/checkpoints/step-00000003",
            f"--mesh={mesh}",
            "--prompt=word1 ",
            "--max_new_tokens=8",
            "--seed=5",
            f"--json={out}",
        )
        assert done.status == 0, done.err
        result = json.loads(out.read_text())
        assert result["prompt"] == "word1 "
        assert done.out.startswith("word1 " + result["text"][:1])
        texts[mesh] = result["tokens"]
    assert texts["1"] == texts["tensor=2"]
    assert len(texts["1"]) <= len("word1 ") + 8


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
    "json is a folder": (["--json=.."], ["--json", "is a folder"]),
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
        ([text, f"--tokenizer={large}"], "301 tokens"),
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


def test_damaged_metrics_are_found_first(tmp_path, run_program):
    """Fails if a resumed run reads data and builds a model before it has a traceback."""
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("")
    (tmp_path / "metrics.jsonl").write_text("{\n")
    done = run_program(train, *COMMON, f"--workdir={tmp_path}", "--resume", "--data=no/such")
    assert (done.status, "metrics.jsonl, line 1 is not JSON" in done.err) == (2, True)


def test_a_folder_in_use_is_not_shared(tmp_path, run_program):
    """Fails if two runs write to one folder, or the second does not say who holds it; or if it
    reads data first."""
    with claimed(tmp_path / "run"):
        done = run_program(train, *COMMON, f"--workdir={tmp_path / 'run'}", "--data=no/such")
    assert done.status == 2
    assert f"run is in use by process {os.getpid()} on the host" in done.err


@pytest.mark.parametrize("module", [train, evaluate, generate])
def test_one_process_is_not_one_of_several(module, monkeypatch, run_program):
    """Fails if each worker of a cluster trains or evaluates by itself, as if it were all."""
    cluster = {"worker": ["localhost:1", "localhost:2"]}
    task = {"type": "worker", "index": 0}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    wrong = "--preset=no_such" if module is train else "--checkpoint=no_such"
    done = run_program(module, wrong)
    assert (done.status, "TF_CONFIG names 2" in done.err) == (2, True)
    monkeypatch.setenv("TF_CONFIG", "{")
    assert "TF_CONFIG is not JSON" in run_program(module, wrong).err
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"chief": ["localhost:1"]}}))
    assert "no_such" in run_program(module, wrong).err


def test_a_checkpoint_of_another_model(finished, trained, text, run_program):
    """Fails if weights of another model are loaded, or the refusal is a traceback."""
    done = run_program(train, *trained[1], "--preset=llama_tiny", "--resume")
    assert done.status == 2
    assert "gpt" in done.err
    assert "llama" in done.err
    nothing = run_program(evaluate, *COMMON, text, f"--checkpoint={finished}/no_such")
    assert (nothing.status, "no_such" in nothing.err) == (2, True)
    which = run_program(generate, *COMMON, "--prompt=a")
    assert (which.status, "--checkpoint" in which.err) == (2, True)
    long = run_program(generate, *COMMON, f"--checkpoint={finished}", f"--prompt={'a' * 200}")
    assert (long.status, "128 positions" in long.err) == (2, True)


@pytest.mark.parametrize("module", [train, evaluate, generate])
def test_help_is_enough_to_start(module, run_program):
    """Fails if help lacks an example, or a flag of the program."""
    done = run_program(module, "--help")
    assert done.status == 0
    assert f"llmos-{module.__name__.rpartition('.')[2]} " in done.out
    for name in module._FLAGS:
        assert f"--{name}\n" in done.out
    assert max(map(len, done.out.splitlines())) <= 100


def test_a_signal_saves_and_ends(text, tmp_path):
    """Fails if SIGTERM kills the run, loses a step, or ends it with an error."""
    workdir = tmp_path / "run"
    arguments = ["--mesh=1", "--global_batch=4", "--seq_len=16", "--steps=100000", text]
    command = [sys.executable, "-m", "llmos_tf.scripts.train", *arguments, f"--workdir={workdir}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
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
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{last:08d}"
    assert (workdir / "curves.png").exists()
