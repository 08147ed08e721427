"""Tokenizers: nothing is lost, nothing is added, and every id fits the vocabulary."""

import json
import os
import types

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf.data import tokenizers
from llmos_tf.data.tokenizers import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

pytestmark = pytest.mark.fast

VALID_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@pytest.fixture
def save(tmp_path):
    """Returns a function that saves a byte-level tokenizer with the given special tokens."""

    def save_tokenizer(*names, special=True, change=None):
        alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
        model = hf.models.BPE({letter: index for index, letter in enumerate(alphabet)}, [])
        tokenizer = hf.Tokenizer(model)
        tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = hf.decoders.ByteLevel()
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(names))
        if change is not None:
            change(tokenizer)
        path = tmp_path / "tokenizer.json"
        tokenizer.save(str(path))
        return path

    return save_tokenizer


class TestByteTokenizer:
    @settings(max_examples=50, deadline=None)
    @given(VALID_TEXT)
    def test_any_text_comes_back_from_its_bytes(self, text):
        """Catches a character set other than UTF-8, and an end marker that a text may contain."""
        tokenizer = ByteTokenizer()
        tokens = tokenizer.encode(text)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == list(text.encode())
        assert tokenizer.end_of_document not in tokens
        assert tokenizer.num_bytes(text) == tokens.size
        assert tokenizer.decode([*tokens, tokenizer.end_of_document]) == text

    def test_cut_characters_are_replaced_and_ends_dropped(self):
        """Catches a crash on what a model samples in the middle of a character."""
        assert ByteTokenizer().decode([104, 195, 255, 105]) == "h\ufffdi"
        assert ByteTokenizer().decode([255, 195, 169]) == "é"
        assert ByteTokenizer().decode([]) == ""

    @pytest.mark.parametrize("token", [256, -1])
    def test_an_id_that_is_no_byte_is_refused(self, token):
        """Catches a wrap-around to another byte when a vocabulary was padded."""
        with pytest.raises(ValueError, match=f"{token} is not a byte"):
            ByteTokenizer().decode(np.array([65, token]))


class TestFileTokenizer:
    def test_text_comes_back_and_the_protocol_is_met(self, save):
        """Catches a decode or encode that is not the file's own."""
        tokenizer = FileTokenizer(save("<|endoftext|>"))
        tokens = tokenizer.encode("Añ é!")
        assert tokens.dtype == np.int32
        assert tokenizer.decode(tokens) == "Añ é!"
        assert tokenizer.num_bytes("Añ é!") == 7
        assert isinstance(tokenizer, Tokenizer)
        assert isinstance(ByteTokenizer(), Tokenizer)
        assert (tokenizer.end_of_document, tokenizer.vocab_size) == (256, 257)

    def test_no_special_token_is_added(self, save):
        """Catches [CLS] and [SEP] inside the corpus, with their loss."""

        def surround(tokenizer):
            ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
            tokenizer.post_processor = hf.processors.TemplateProcessing(
                single="[CLS] $A [SEP]", special_tokens=ids
            )

        path = save("[CLS]", "[SEP]", change=surround)
        assert len(hf.Tokenizer.from_file(str(path)).encode("abc").ids) == 5
        assert FileTokenizer(path).encode("abc").size == 3

    def test_truncation_and_padding_of_the_file_are_switched_off(self, save):
        """Catches documents cut to 512 tokens without a word."""

        def limit(tokenizer):
            tokenizer.enable_truncation(4)
            tokenizer.enable_padding(length=8)

        tokenizer = FileTokenizer(save("</s>", change=limit))
        assert tokenizer.encode("abcdefg").size == 7
        assert tokenizer.encode("ab").size == 2

    @pytest.mark.parametrize("names", [("[SEP]", "<|endoftext|>"), ("<eos>", "</s>")])
    def test_the_end_is_the_first_of_the_known_names(self, save, names):
        """Catches the order of the file, in which [SEP] may come before the real end."""
        path = save(*names)
        assert FileTokenizer(path).end_of_document == 257

    def test_the_end_is_dropped_though_the_file_does_not_call_it_special(self, save):
        """Catches "</s>" in generated text."""
        tokenizer = FileTokenizer(save("</s>", special=False))
        assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.end_of_document]) == "ab"

    def test_the_vocabulary_reaches_beyond_gaps_in_the_ids(self, tmp_path):
        """Catches an embedding too small for the largest id."""
        tokenizer = hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 900}, unk_token="a"))
        tokenizer.save(str(tmp_path / "gaps.json"))
        assert FileTokenizer(tmp_path / "gaps.json").vocab_size == 901

    def test_a_file_without_an_end_is_refused(self, save):
        """Catches an arbitrary id as the end of documents."""
        with pytest.raises(ValueError, match=r"no token that ends a document.*<\|endoftext\|>"):
            FileTokenizer(save("<pad>"))


class TestLoadTokenizer:
    def test_a_file_is_a_file_tokenizer_and_none_is_bytes(self, save):
        """Catches the two swapped."""
        assert isinstance(load_tokenizer(str(save("</s>"))), FileTokenizer)
        assert isinstance(load_tokenizer(None), ByteTokenizer)

    def test_a_missing_file_is_refused(self, tmp_path):
        """Catches the package's error, which does not name the file."""
        with pytest.raises(FileNotFoundError, match=r"no\.json.*tokenizer\.json"):
            load_tokenizer(tmp_path / "no.json")

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", json.dumps([1]).encode()])
    def test_another_file_is_refused(self, tmp_path, content):
        """Catches the package's plain Exception, which no caller can catch by name."""
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.json' is not a tokenizer file"):
            load_tokenizer(tmp_path / "other.json")

    def test_a_fifo_is_refused(self, tmp_path):
        """Catches a wait for ever."""
        os.mkfifo(tmp_path / "fifo.json")
        with pytest.raises(ValueError, match=r"fifo\.json must be a regular file.*a FIFO"):
            load_tokenizer(tmp_path / "fifo.json")

    def test_an_id_beyond_int32_is_refused(self, tmp_path):
        """Catches a bare OverflowError when the first text is encoded."""
        text = hf.Tokenizer(hf.models.WordLevel({"</s>": 0, "a": 1}, unk_token="a")).to_str()
        (tmp_path / "large.json").write_text(text.replace('"a":1', f'"a":{2**31}'))
        with pytest.raises(ValueError, match=r"Received: 2,147,483,648 in .*large\.json"):
            load_tokenizer(tmp_path / "large.json")

    def test_a_failed_check_of_the_package_is_an_error_of_the_file(self, save, monkeypatch):
        """Catches a BaseException, which ends a program without the name of the file."""

        class PanicException(BaseException):
            pass

        def fail(*_):
            raise PanicException("index out of bounds")

        path = save("</s>")
        tokenizer = FileTokenizer(path)
        tokenizer._tokenizer = types.SimpleNamespace(decode=fail)
        with pytest.raises(ValueError, match=r"tokenizer\.json' cannot process this: index out"):
            tokenizer.decode([1])
        fake = types.SimpleNamespace(Tokenizer=types.SimpleNamespace(from_buffer=fail))
        monkeypatch.setattr(tokenizers, "hf_tokenizers", fake)
        with pytest.raises(ValueError, match=r"not a tokenizer file \(index out of bounds\)"):
            FileTokenizer(path)

    def test_a_folder_is_refused(self, tmp_path):
        """Catches the package's plain Exception for a model's folder."""
        with pytest.raises(ValueError, match=r"not a tokenizer file.*tokenizer\.json"):
            load_tokenizer(tmp_path)
