"""llmos-generate: what it prints, and what it refuses before it generates."""

import json

import keras
import numpy as np
import pytest
import tokenizers as hf

from llmos_tf.checkpoint import save_checkpoint
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.scripts import generate as script
from llmos_tf.scripts.flags import FLAGS
from llmos_tf.scripts.printable import printable
from llmos_tf.scripts.programs import generate as work

# More tokens than the 256 bytes.
CONFIG = GPTConfig(vocab_size=300, max_positions=16, hidden_size=8, num_heads=2, num_layers=1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint of a new model, and one of a model whose weights are NaN."""
    folder = tmp_path_factory.mktemp("checkpoints")
    keras.utils.set_random_seed(0)
    model = GPT(CONFIG)
    save_checkpoint(folder / "new", model, step=1)
    model.final_norm.beta.assign(np.full([8], np.nan))
    save_checkpoint(folder / "diverged", model, step=1)
    return folder


@pytest.fixture
def run_script(checkpoints, monkeypatch, capsys):
    """(checkpoint, *arguments) -> exit status, stdout, stderr."""

    def run(checkpoint, *arguments):
        FLAGS.unparse_flags()
        for name in FLAGS:
            if FLAGS[name].present:
                FLAGS[name].unparse()
        common = ["--virtual_devices=8", "--mesh=1", f"--checkpoint={checkpoints / checkpoint}"]
        # These checkpoints record no tokenizer.
        common.append("--tokenizer=bytes")
        monkeypatch.setattr("sys.argv", ["llmos-generate", *common, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            script.run()
        return end.value.code or 0, *capsys.readouterr()

    yield run
    FLAGS.unparse_flags()
    FLAGS(["pytest"])


def test_it_goes_on_with_a_text(run_script, tmp_path):
    """Fails if the prompt is lost, the seed has no effect, or a token beyond the tokenizer's is
    drawn, which has no text."""
    path = tmp_path / "out.json"
    texts = []
    for seed in (1, 1, 2):
        arguments = ("--prompt=ab", "--temperature=1000", f"--seed={seed}", f"--json={path}")
        status, out, err = run_script("new", *arguments)
        assert status == 0, err
        result = json.loads(path.read_text())
        assert out == printable(f"ab{result['text']}") + "\n"
        # Some of the bytes of a new model are control characters, which --raw prints.
        assert not any(ord(character) < 32 for character in out.replace("\t", "").strip("\n"))
        assert result["tokens"][:2] == [97, 98]
        assert max(result["tokens"]) < 256
        texts.append(result["tokens"])
    assert texts[0] == texts[1] != texts[2]
    _, raw, _ = run_script("new", *arguments, "--raw")
    assert raw == f"ab{result['text']}\n" != out


def test_greedy_needs_no_seed(run_script):
    """Fails if --temperature=0 or --max_new_tokens does not reach the model."""
    arguments = ("--prompt=ab", "--temperature=0", "--max_new_tokens=3")
    outs = [run_script("new", *arguments, f"--seed={seed}") for seed in (1, 2)]
    assert outs[0] == outs[1]
    assert outs[0][0] == 0
    assert len(outs[0][1]) <= len("ab" + 3 * "x" + "\n")


# What a person gets wrong, and the words that must be in the one paragraph of the answer.
MISUSE = {
    "no prompt": ([], ["--prompt='some text'"]),
    "a long prompt": ([f"--prompt={'a' * 16}"], ["16 tokens", "16 positions", "at most 15"]),
    "no new token": (["--prompt=ab", "--max_new_tokens=0"], ["from 1 to 14", "Received: 0"]),
    "many new tokens": (["--prompt=ab", "--max_new_tokens=15"], ["from 1 to 14", "Received: 15"]),
    "temperature": (["--prompt=ab", "--temperature=-1"], ["temperature=-1.0", "positive"]),
    "top_k": (["--prompt=ab", "--top_k=0"], ["top_k=0", "positive"]),
    "top_p": (["--prompt=ab", "--top_p=1.5"], ["top_p=1.5", "(0, 1]"]),
    "seed": (["--prompt=ab", "--seed=-1"], ["--seed", "-1"]),
    "tokenizer": (["--prompt=ab", "--tokenizer=large.json"], ["400 tokens", "only 300"]),
    "no token": (["--prompt= ", "--tokenizer=words.json"], ["no token of --prompt=' '"]),
    "mesh": (["--prompt=ab", "--mesh=tensor=3"], ["tensor", "of size 3", "divide"]),
}


def test_a_misuse_is_one_paragraph(run_script, tmp_path, monkeypatch):
    """Fails for a traceback, another exit status, or an answer that does not name what was
    received."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("large", 400), ("words", 4)):
        words = {f"w{i}": i for i in range(size - 1)} | {"</s>": size - 1}
        tokenizer = hf.Tokenizer(hf.models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
        tokenizer.save(f"{name}.json")
    for case, (arguments, words) in MISUSE.items():
        status, out, err = run_script("new", *arguments)
        assert (status, out) == (2, ""), case
        assert err.startswith("llmos-generate: ")
        assert len(err.strip().splitlines()) == 1
        assert [word for word in words if word not in err] == [], err
    status, _, err = run_script("diverged", "--prompt=ab")
    assert status == 2
    assert "training diverged" in err


def test_a_fault_of_the_program_is_not_a_misuse(run_script, monkeypatch):
    """Fails if an error of generation itself is shown as something that the user got wrong."""

    def broken(*args, **kwargs):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(work, "generate", broken)
    with pytest.raises(ValueError, match="shapes do not match"):
        run_script("new", "--prompt=ab")
