"""Damaged files: an error that names the file, or the right values, and never anything else."""

import json
import os
import random
import re

import keras
import numpy as np
import pytest
import tokenizers as hf

from llmos_tf.checkpoint import load_config, restore_checkpoint, save_checkpoint
from llmos_tf.data import FileTokenizer, load_corpus
from llmos_tf.models import GPT, GPTConfig
from llmos_tf.training.reporting import read_metrics

NUM_MUTATIONS = 1000
TEXT = "the cat sat on the mat"


class Checkpoint:
    """A checkpoint of which one file is damaged: restored as it was, or refused.

    Args:
        folder: an empty one.
        name: of the file.
        version: of `state.json`. The first has no checksum, so there only weights are compared.
    """

    def __init__(self, folder, name, version=2):
        keras.utils.set_random_seed(0)
        config = GPTConfig(vocab_size=9, max_positions=4, hidden_size=4, num_heads=2, num_layers=1)
        self._model = GPT(config)
        self._model.compile("adam", "mse")
        extra = {"batches": {"epoch": 1, "position": 3}}
        self._checkpoint = save_checkpoint(folder, self._model, step=120, extra=extra)
        self._version = version
        if version == 1:
            file = self._checkpoint / "state.json"
            content = json.loads(file.read_text()) | {"format_version": 1}
            del content["sha256"]
            file.write_text(json.dumps(content))
        self.path, self.names = self._checkpoint / name, [self._checkpoint.name]
        self._expected = self._read()

    def check(self, content):
        del content
        for found, expected in zip(self._read(), self._expected, strict=True):
            np.testing.assert_array_equal(found, expected)

    def _read(self):
        # A model of that size could be built.
        assert load_config(self._checkpoint).num_parameters() <= self._model.count_params()
        state = restore_checkpoint(self._checkpoint, self._model)
        variables = [*self._model.variables, *self._model.optimizer.variables]
        values = [variable.numpy() for variable in variables]
        return values if self._version == 1 else [state, *values]


class Tokenizer:
    """A tokenizer.json: what the package makes of the same bytes, or refused."""

    def __init__(self, folder):
        letters = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
        words = {letter: index for index, letter in enumerate([*letters, "th", "the", "at"])}
        model = hf.models.BPE(words, [("t", "h"), ("th", "e"), ("a", "t")])
        tokenizer = hf.Tokenizer(model)
        tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = hf.decoders.ByteLevel()
        tokenizer.add_special_tokens(["</s>", "<unk>"])
        tokenizer.enable_truncation(4)
        self.path, self.names = folder / "tokenizer.json", ["tokenizer.json"]
        # Short, so that more than the vocabulary is hit.
        self.path.write_text(json.dumps(json.loads(tokenizer.to_str())))

    def check(self, content):
        found = FileTokenizer(self.path)
        theirs = hf.Tokenizer.from_str(content.decode())
        theirs.no_truncation()
        theirs.no_padding()
        tokens = found.encode(TEXT)
        assert tokens.tolist() == theirs.encode(TEXT, add_special_tokens=False).ids
        assert tokens.max(initial=0) < found.vocab_size
        assert found.vocab_size == max(theirs.get_vocab().values()) + 1
        found.decode(tokens)


class Jsonl:
    """A corpus of JSONL: the text of each line, or refused."""

    def __init__(self, folder):
        self.path, self.names = folder / "a.jsonl", ["a.jsonl"]
        documents = [{"text": f"{TEXT} {n} é", "id": n, "score": n / 7} for n in range(12)]
        lines = [json.dumps(document, ensure_ascii=False) for document in documents]
        self.path.write_text("\n".join([*lines, '"a string"', ""]))

    def check(self, content):
        corpus = load_corpus(str(self.path))
        values = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line]
        texts = [value["text"] if isinstance(value, dict) else value for value in values]
        expected = [text for text in texts if text.strip()]
        assert "".join(corpus.train + corpus.heldout) == "".join(expected)


class Text:
    """A corpus of text: its characters, or refused."""

    def __init__(self, folder):
        self.path, self.names = folder / "a.txt", ["a.txt"]
        self.path.write_text(f"\ufeff{TEXT} é\r\n" * 5)

    def check(self, content):
        corpus = load_corpus(str(self.path))
        assert "".join(corpus.train + corpus.heldout) == content.decode("utf-8-sig")


class Metrics:
    """metrics.jsonl: the numbers of each whole line, or refused."""

    def __init__(self, folder):
        self.path, self.names = folder / "metrics.jsonl", ["metrics.jsonl"]
        row = {"loss": 1.5, "learning_rate": 0.1, "tokens_per_second": 9.0, "mfu": 0.1}
        lines = [json.dumps({"step": n, "seconds": 0.5, **row}) + "\n" for n in range(1, 6)]
        self.path.write_text("".join(lines))

    def check(self, content):
        rows = read_metrics(self.path)
        expected = [json.loads(line) for line in content.split(b"\n")[:-1]]
        assert str(rows) == str(expected)
        assert all(np.isreal(row["seconds"] + row["loss"] + row["mfu"]) for row in rows)


CASES = {
    "state.json": lambda folder: Checkpoint(folder, "state.json"),
    "model.safetensors": lambda folder: Checkpoint(folder, "model.safetensors"),
    "optimizer.safetensors": lambda folder: Checkpoint(folder, "optimizer.safetensors"),
    "state.json of version 1": lambda folder: Checkpoint(folder, "state.json", version=1),
    "tokenizer.json": Tokenizer,
    "jsonl": Jsonl,
    "text": Text,
    "metrics.jsonl": Metrics,
}
VALUES = ["-1", "1e999", "NaN", "9" * 4000, "9" * 5000, "4294967296", "null", '"1"', "true", "0.5"]
VALUES += ["[" * 900 + "]" * 900, "[" * 100_000, '"\\ud800"', "{}", str(2**31 - 1), str(2**64)]


def mutate(chance, content):
    """One random damage of a file's bytes, or another value of a number or string in it."""
    begin = chance.randrange(len(content))
    end = min(len(content), begin + chance.choice([1, 4, 64, len(content)]))
    before, piece, after = content[:begin], content[begin:end], content[end:]
    kind = chance.randrange(8)
    if kind == 0:
        return before + bytes([content[begin] ^ 1 << chance.randrange(8)]) + content[begin + 1 :]
    if kind == 1:
        return before + chance.randbytes(len(piece)) + after
    if kind == 2:
        return before
    if kind == 3:
        return before + after
    if kind == 4:
        return before + piece + piece + after
    if kind == 5:
        return before + bytes(len(piece)) + after
    # Strings are names of fields as well.
    token = chance.choice([*re.finditer(rb'-?\d[\d.e+-]*|"[^"]{0,40}"', content)] or [None])
    if token is None:
        return b""
    return content[: token.start()] + chance.choice(VALUES).encode() + content[token.end() :]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return [make(tmp_path_factory.mktemp("case")) for make in CASES.values()]


@pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(0, NUM_MUTATIONS, 9), marks=pytest.mark.fast, id="some"),
        pytest.param(range(NUM_MUTATIONS), marks=pytest.mark.nightly, id="all"),
    ],
)
def test_seeded_mutations(cases, seeds):
    """Fails for an error of another class, one without the file's name, or values that are not
    those of the file; a seed reproduces it."""
    num_refused = 0
    for seed in seeds:
        case = cases[seed % len(cases)]
        original = case.path.read_bytes()
        content = mutate(random.Random(seed), original)
        case.path.write_bytes(content)
        try:
            case.check(content)
        except ValueError as error:
            assert [name for name in case.names if name not in str(error)] == [], seed
            # What is quoted of the file has a limit.
            assert len(str(error)) < 2000, seed
            num_refused += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {case.path}: {type(error).__name__}") from error
        finally:
            case.path.write_bytes(original)
    # Not everything is refused, and most damage is.
    assert len(seeds) // 3 < num_refused < len(seeds)


SPECIAL = {
    "a FIFO": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a link to itself": lambda path: os.symlink(path, path),
    "missing": lambda path: None,
}


@pytest.mark.fast
@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_no_file(cases, special):
    """Fails if a reader waits for ever, reads without end, or does not name what it was given."""
    for case in cases:
        original = case.path.read_bytes()
        case.path.unlink()
        SPECIAL[special](case.path)
        try:
            with pytest.raises((ValueError, OSError)) as caught:
                case.check(original)
            assert [name for name in case.names if name not in str(caught.value)] == []
            known = "a link to itself", "missing"
            assert special in known or isinstance(caught.value, ValueError | FileNotFoundError)
        finally:
            case.path.rmdir() if special == "a folder" else case.path.unlink(missing_ok=True)
            case.path.write_bytes(original)
