"""The way from a corpus to packed tokens, and what the package says that it has."""

import pathlib
import subprocess
import sys

import pytest

import llmos_tf.data
from llmos_tf.data import BatchIterator, ByteTokenizer, load_text_data

pytestmark = pytest.mark.fast

PACKAGE = pathlib.Path(llmos_tf.data.__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        (tmp_path / f"{index}.txt").write_text(f"Text number {index} is café.\n" * (5 + index))
    return tmp_path


def decoded(packed):
    """Returns the text of a packed stream, its padding dropped with the ends."""
    return ByteTokenizer().decode(packed.tokens)


def test_both_parts_are_packed_and_the_bytes_are_the_heldout_ones(folder):
    """Catches parts swapped, and bytes counted over the wrong part or in characters."""
    data = load_text_data(f"{folder}/*.txt", None, sequence_length=16, heldout_fraction=0.5)
    texts = [(folder / f"{index}.txt").read_text() for index in range(4)]
    heldout = "".join(texts[2:])
    assert decoded(data.train) == "".join(texts[:2])
    assert decoded(data.heldout) == heldout
    assert data.heldout_bytes == len(heldout.encode()) > len(heldout)
    assert data.train.sequence_length == data.heldout.sequence_length == 16
    assert data.corpus_name == f"{folder}/*.txt"
    # For each document its bytes and its end, less its first byte.
    assert data.heldout.num_targets == data.heldout_bytes


def test_a_tokenizer_can_be_given_ready_made(folder):
    """Catches a tokenizer replaced by bytes, or its end of documents not used."""

    class Shifted(ByteTokenizer):
        vocab_size = 300
        end_of_document = 299

    tokenizer = Shifted()
    data = load_text_data(f"{folder}/*.txt", tokenizer, sequence_length=16)
    assert data.tokenizer is tokenizer
    # A model of bytes, whatever the tokens are.
    of_bytes = load_text_data(f"{folder}/*.txt", None, sequence_length=16)
    assert data.bigram_bits_per_byte == of_bytes.bigram_bits_per_byte
    assert (data.train.tokens == 299).sum() >= 3
    assert not (data.train.tokens == 255).any()


def test_a_wrong_tokenizer_is_said_before_the_corpus_is_read(folder):
    """Catches minutes of reading before a misspelt path is reported."""
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        load_text_data(f"{folder}/missing*", str(folder / "no.json"), sequence_length=16)


def test_batches_and_baseline_follow_from_it(folder):
    """Catches parts that do not fit together: the call a script makes."""
    data = load_text_data(f"{folder}/*.txt", None, sequence_length=16)
    x, y, weights = next(BatchIterator(data.train, batch_size=64, seed=0))
    assert x.shape == y.shape == weights.shape == (64, 16)
    assert 0.0 < data.bigram_bits_per_byte < 8.0


def test_every_public_name_exists_once_and_in_order():
    """Catches a name that is listed and not imported, or the other way round."""
    names = llmos_tf.data.__all__
    assert names == sorted(set(names))
    assert all(hasattr(llmos_tf.data, name) for name in names)
    defined = {
        name
        for name, value in vars(llmos_tf.data).items()
        if getattr(value, "__module__", "").startswith("llmos_tf.data.")
    }
    assert defined <= set(names)


def test_no_module_imports_tensorflow_or_the_rest_of_the_project():
    """Catches an import that makes tokenizing wait for TensorFlow to start."""
    # The package's own __init__ may import TensorFlow: stand in for it with a bare module.
    code = (
        "import importlib, sys, types; package = types.ModuleType('llmos_tf'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['llmos_tf'] = package; "
        "importlib.import_module('llmos_tf.data'); "
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras') "
        "or m.startswith('llmos_tf.') and not m.startswith('llmos_tf.data')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
