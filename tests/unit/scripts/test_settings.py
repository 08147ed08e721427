"""Settings that a checkpoint records, and flags that contradict them. Nothing is trained."""

import os

import pytest
import tokenizers as hf

from llmos_tf.checkpoint.manifest import Manifest, write_manifest
from llmos_tf.data import load_text_data
from llmos_tf.models import get_preset
from llmos_tf.scripts import settings
from llmos_tf.scripts.flags import FLAGS
from llmos_tf.scripts.recorded import TOKENIZER_FILE, Record, to_record

pytestmark = pytest.mark.fast


@pytest.fixture
def parse():
    """(*arguments): gives the flags these values."""

    def parse(*arguments):
        FLAGS.unparse_flags()
        for name in FLAGS:
            if FLAGS[name].present:
                FLAGS[name].unparse()
        FLAGS(["program", *arguments])

    yield parse
    FLAGS.unparse_flags()
    FLAGS(["pytest"])


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A corpus and two tokenizers in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 " * 50)
    for name, size in (("own.json", 300), ("other.json", 301)):
        words = {f"w{i}": i for i in range(size - 1)} | {"</s>": size - 1}
        tokenizer = hf.Tokenizer(hf.models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
        tokenizer.save(name)
    return tmp_path


TRAINED = (
    *("--preset=gpt_mini", "--data=text.txt", "--tokenizer=own.json", "--seq_len=16"),
    *("--global_batch=6", "--mesh=data=2", "--zero_stage=1", "--steps=8", "--seed=3"),
)


@pytest.fixture
def run_of(parse, text):
    """(step, workdir, *flags): writes the record of a run's checkpoint, as llmos-train does."""

    def write(step=4, workdir="llmos_runs/run", flags=TRAINED):
        parse(*flags, f"--workdir={workdir}")
        options = settings.train_options()
        data = load_text_data(options.data, options.tokenizer, options.seq_len)
        folder = text / workdir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        manifest = Manifest(
            step=step,
            config=get_preset(options.preset).to_dict(),
            optimizer=None,
            extra=to_record(options, data),
            model_variables=[],
            optimizer_variables=[],
        )
        write_manifest(folder, manifest)
        return folder

    return write


def test_resume_takes_what_the_checkpoint_records(run_of, parse, text, monkeypatch, capsys):
    """Fails if a resumed run needs its flags again, in another folder too, or does not say which
    run it continues and what has changed."""
    run_of()
    parse("--resume")
    options = settings.train_options()
    assert "Resuming llmos_runs/run/checkpoints/step-00000004\n" in capsys.readouterr().out
    assert options.workdir == "llmos_runs/run"
    assert options.tokenizer == str(text / "own.json")
    assert options.data == str(text / "text.txt")
    expected = {
        "preset": "gpt_mini",
        "mesh": "data=2",
        "zero_stage": 1,
        "seq_len": 16,
        "global_batch": 6,
        "seed": 3,
        "steps": 8,
    }
    assert {name: getattr(options, name) for name in expected} == expected
    (text / "elsewhere").mkdir()
    monkeypatch.chdir(text / "elsewhere")
    parse("--resume", "--workdir=../llmos_runs/run", "--mesh=tensor=2", "--steps=9")
    options = settings.train_options()
    # Options of a mesh go with it.
    assert (options.mesh, options.zero_stage, options.steps) == ("tensor=2", 0, 9)
    assert options.data == str(text / "text.txt")
    changes = "--mesh=tensor=2 (was data=2), --zero_stage=0 (was 1), --steps=9 (was 8)"
    assert changes in capsys.readouterr().out


def test_the_newest_run_is_resumed(run_of, parse, text):
    """Fails if --resume alone continues another run than the last one, or none is found without a
    word."""
    parse("--resume")
    with pytest.raises(ValueError, match=r"the newest run in llmos_runs/, and there is none"):
        settings.train_options()
    old, new = run_of(workdir="llmos_runs/z"), run_of(workdir="llmos_runs/a")
    os.utime(old / "state.json", (1, 1))
    parse("--resume")
    assert settings.train_options().workdir == "llmos_runs/a"
    os.utime(new / "state.json", (0, 0))
    assert settings.train_options().workdir == "llmos_runs/z"


@pytest.mark.parametrize(
    ("flag", "recorded"),
    [
        ("--preset=gpt_tiny", "--preset=gpt_mini"),
        ("--data=other.txt", "text.txt"),
        ("--seq_len=8", "--seq_len=16"),
        ("--global_batch=4", "--global_batch=6"),
        ("--seed=4", "--seed=3"),
        ("--tokenizer=other.json", "own.json"),
        ("--tokenizer=bytes", "own.json"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint(flag, recorded, run_of, parse):
    """Fails if another run is continued, or the error does not name both values."""
    run_of()
    parse("--resume", "--workdir=llmos_runs/run", flag)
    with pytest.raises(ValueError, match="is of a run with --") as error:
        settings.train_options()
    assert flag in str(error.value)
    assert recorded in str(error.value)


def test_the_same_flags_again_are_no_contradiction(run_of, parse, text):
    """Fails if the flags of the first start, or another path of the same files, are refused."""
    run_of()
    (text / "copy.json").write_bytes((text / "own.json").read_bytes())
    parse(*TRAINED, "--resume", "--workdir=llmos_runs/run", f"--data={text}/text.txt")
    assert settings.train_options().seq_len == 16
    parse("--resume", "--workdir=llmos_runs/run", "--tokenizer=copy.json")
    assert settings.train_options().tokenizer == "copy.json"


def test_nothing_is_left_to_train(run_of, parse, text, capsys):
    """Fails if a run that is done is evaluated again, or ends without a word; or if one whose
    evaluation was interrupted is not evaluated."""
    run_of(step=8)
    parse("--resume", "--workdir=llmos_runs/run")
    assert settings.train_options().steps == 8
    (text / "llmos_runs" / "run" / "summary.json").write_text("{}")
    capsys.readouterr()
    assert settings.train_options() is None
    out = capsys.readouterr().out
    assert "Nothing is left to train in llmos_runs/run: step-00000008 has done all 8 steps" in out
    parse("--resume", "--workdir=llmos_runs/run", "--steps=9")
    assert settings.train_options().steps == 9


def test_evaluation_is_of_the_run(run_of, parse, text):
    """Fails if a checkpoint is measured on other tokens, another length or another text than it was
    trained on, or its own may not be changed where that makes sense."""
    folder = run_of()
    for checkpoint in ("llmos_runs/run", "llmos_runs/run/checkpoints", folder):
        parse(f"--checkpoint={checkpoint}")
        options = settings.evaluate_options()
        assert (text / options.checkpoint).samefile(folder)
        assert (options.seq_len, options.global_batch, options.mesh) == (16, 6, "data=2")
        assert options.tokenizer == str(text / "own.json")
        assert options.data == str(text / "text.txt")
    # The recorded batch is no multiple of four.
    parse("--checkpoint=llmos_runs/run", "--mesh=fsdp=4", "--data=stdlib")
    options = settings.evaluate_options()
    assert (options.global_batch, options.data, options.zero_stage) == (8, "stdlib", 0)
    parse("--checkpoint=llmos_runs/run", "--workdir=llmos_runs/other")
    with pytest.raises(ValueError, match=r"Give one of them"):
        settings.evaluate_options()
    for flag, recorded in (("--seq_len=8", "--seq_len=16"), ("--tokenizer=bytes", "own.json")):
        parse("--checkpoint=llmos_runs/run", flag)
        with pytest.raises(ValueError, match="is of a run with --") as error:
            settings.evaluate_options()
        assert flag in str(error.value)
        assert recorded in str(error.value)


def test_generation_is_of_the_run(run_of, parse, text):
    """Fails if a text is continued in tokens of another tokenizer, or with the seed of training."""
    run_of()
    parse("--checkpoint=llmos_runs/run", "--prompt=w1", "--top_k=3", "--raw")
    options = settings.generate_options()
    assert options.run.tokenizer == str(text / "own.json")
    assert (options.run.seed, options.prompt, options.raw) == (0, "w1", True)
    assert options.sampling(300).top_k == 3
    parse("--checkpoint=llmos_runs/run", "--prompt=w1", "--tokenizer=other.json")
    with pytest.raises(ValueError, match=r"own\.json\. Received: --tokenizer=other\.json"):
        settings.generate_options()
    parse("--checkpoint=llmos_runs/run")
    with pytest.raises(ValueError, match=r"Give --prompt='some text'"):
        settings.generate_options()


def test_the_tokenizer_moves_with_the_run(run_of, parse, text):
    """Fails if a run cannot be moved to a machine without the original tokenizer, or another file
    in its place is taken for it."""
    run_of()
    parse("--checkpoint=llmos_runs/run")
    (text / "own.json").rename(text / "llmos_runs" / "run" / TOKENIZER_FILE)
    (text / "llmos_runs" / "run").rename(text / "moved")
    parse("--checkpoint=moved")
    assert settings.evaluate_options().tokenizer == str(text / "moved" / TOKENIZER_FILE)
    (text / "moved" / TOKENIZER_FILE).write_bytes((text / "other.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"is neither .*moved/tokenizer\.json nor"):
        settings.evaluate_options()


def test_a_checkpoint_of_another_program(run_of, parse, text):
    """Fails if a checkpoint without a record is read as bytes of the standard library."""
    folder = run_of()
    record = Record.read(folder)
    config = record.config.to_dict()
    manifest = Manifest(
        step=1,
        config=config,
        optimizer=None,
        extra={},
        model_variables=[],
        optimizer_variables=[],
    )
    write_manifest(folder, manifest)
    for flags, words in (
        ((), "does not record its tokenizer"),
        (("--tokenizer=bytes",), "does not record its text"),
    ):
        parse(f"--checkpoint={folder}", *flags)
        with pytest.raises(ValueError, match=words):
            settings.evaluate_options()
    parse(f"--checkpoint={folder}", "--tokenizer=own.json", "--data=stdlib")
    options = settings.evaluate_options()
    assert (options.tokenizer, options.data, options.seq_len) == ("own.json", "stdlib", 128)
