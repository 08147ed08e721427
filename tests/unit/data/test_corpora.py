"""Corpora: what is read, in which order, what is held out, and what is refused."""

import json
import os
import sys

import pytest

from llmos_tf.data import corpora
from llmos_tf.data.corpora import Corpus, load_corpus

pytestmark = pytest.mark.fast


def write(folder, **contents):
    """Writes files whose names have `_` for the dot."""
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / name.replace("_", ".")).write_bytes(data)
    return str(folder)


def fake_stdlib(monkeypatch, folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda key: str(folder))


class TestStdlib:
    def test_is_megabytes_of_text_named_after_the_version(self):
        """Catches a wrong root folder or a filter that drops nearly everything."""
        corpus = load_corpus("stdlib")
        assert sum(map(len, corpus.train)) > 2_000_000
        assert 0.02 < len(corpus.heldout) / (len(corpus.train) + len(corpus.heldout)) < 0.08
        version = ".".join(map(str, sys.version_info[:3]))
        assert corpus.name.startswith(f"stdlib-{version}")

    def test_leaves_out_tests_packages_and_local_files(self, monkeypatch, tmp_path):
        """Catches a corpus that takes in what differs from machine to machine."""
        kept = ["a.py", "b/c.py", "b/testing.py"]
        dropped = [
            "site-packages/x.py",
            "dist-packages/x.py",
            "test/x.py",
            "b/tests/x.py",
            "idlelib/idle_test/x.py",
            "encodings/cp037.py",
            "config-3.11-linux/python-config.py",
            "_sysconfigdata__linux.py",
            "sitecustomize.py",
            "notes.txt",
        ]
        fake_stdlib(monkeypatch, tmp_path, kept + dropped)
        corpus = load_corpus("stdlib")
        assert [*corpus.train, *corpus.heldout] == [f"# {name}\n" for name in kept]

    def test_order_is_that_of_the_relative_names(self, monkeypatch, tmp_path):
        """Catches the order of the folder walk, which the file system decides."""
        names = ["b.py", "a/z.py", "c/a.py", "a.py", "a/b/c.py", "a-b/c.py"]
        fake_stdlib(monkeypatch, tmp_path, names)
        corpus = load_corpus("stdlib")
        assert [*corpus.train, *corpus.heldout] == [f"# {name}\n" for name in sorted(names)]

    def test_skips_files_that_are_not_utf8_and_keeps_line_ends(self, monkeypatch, tmp_path):
        """Catches a crash on a Latin-1 source, and text mode, which changes the byte count."""
        fake_stdlib(monkeypatch, tmp_path, ["a.py", "b.py", "c.py"])
        (tmp_path / "a.py").write_bytes(b"# caf\xe9\n")
        (tmp_path / "b.py").write_bytes(b"x = 1\r\n")
        corpus = load_corpus("stdlib")
        assert [*corpus.train, *corpus.heldout] == ["x = 1\r\n", "# c.py\n"]

    def test_a_library_without_source_files_is_an_empty_corpus(self, monkeypatch, tmp_path):
        """Catches a bare IndexError where Python keeps its library in a zip file."""
        fake_stdlib(monkeypatch, tmp_path, [])
        with pytest.raises(ValueError, match="'stdlib' is empty"):
            load_corpus("stdlib")


class TestSplit:
    @pytest.mark.parametrize(("count", "expected"), [(2, 1), (3, 1), (20, 1), (40, 2), (100, 5)])
    def test_holds_out_the_last_twentieth_but_at_least_one(self, tmp_path, count, expected):
        """Catches an empty held-out part of a small corpus, and a split from the front."""
        for index in range(count):
            (tmp_path / f"{index:03}.txt").write_text(f"text {index}")
        corpus = load_corpus(str(tmp_path / "*.txt"))
        assert corpus.heldout == tuple(f"text {i}" for i in range(count - expected, count))
        assert corpus.train == tuple(f"text {i}" for i in range(count - expected))

    def test_a_fraction_near_one_leaves_a_document_to_train_on(self, tmp_path):
        """Catches an empty training part."""
        folder = write(tmp_path, a_txt="a", b_txt="b", c_txt="c")
        corpus = load_corpus(f"{folder}/*.txt", heldout_fraction=0.99)
        assert (corpus.train, corpus.heldout) == (("a",), ("b", "c"))

    def test_a_single_document_gives_its_tail(self, tmp_path):
        """Catches text that is lost or shared between the two parts."""
        text = "".join(chr(0x4E00 + index) for index in range(100))
        corpus = load_corpus(write(tmp_path, a_txt=text) + "/a.txt")
        assert (corpus.train, corpus.heldout) == ((text[:95],), (text[95:],))

    def test_two_characters_are_enough_and_one_is_not(self, tmp_path):
        """Catches an empty part of a tiny document."""
        folder = write(tmp_path, two_txt="ab", one_txt="a")
        corpus = load_corpus(f"{folder}/two.txt")
        assert (corpus.train, corpus.heldout) == (("a",), ("b",))
        with pytest.raises(ValueError, match="one document of 1 character"):
            load_corpus(f"{folder}/one.txt")

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
    def test_a_fraction_out_of_range_is_refused(self, fraction):
        """Catches a fraction of 5 for 5%, which would train on next to nothing."""
        with pytest.raises(ValueError, match="heldout_fraction"):
            load_corpus("stdlib", heldout_fraction=fraction)

    def test_a_corpus_needs_both_parts(self):
        """Catches an empty part that would only fail in packing."""
        with pytest.raises(ValueError, match="'heldout'"):
            Corpus(train=("a",), heldout=(), name="x")


class TestFiles:
    def test_a_pattern_descends_and_mixes_text_with_jsonl(self, tmp_path):
        """Catches a pattern that is not recursive, a wrong order, and JSONL read as text."""
        (tmp_path / "sub").mkdir()
        write(tmp_path, b_jsonl='{"text": "two"}\n"three"\n')
        write(tmp_path / "sub", c_txt="four")
        write(tmp_path, a_txt="one")
        corpus = load_corpus(f"{tmp_path}/**/*.*")
        assert [*corpus.train, *corpus.heldout] == ["one", "two", "three", "four"]
        assert corpus.name == f"{tmp_path}/**/*.*"

    def test_a_path_with_brackets_is_a_path_first(self, tmp_path):
        """Catches `[1]` taken as a pattern, so that an existing file is not found."""
        (tmp_path / "notes[1].txt").write_text("some text")
        assert load_corpus(str(tmp_path / "notes[1].txt")).train == ("some tex",)

    def test_a_byte_order_mark_is_dropped_and_line_ends_are_kept(self, tmp_path):
        """Catches U+FEFF in the text, and CRLF turned into LF by text mode."""
        folder = write(tmp_path, a_txt=b"\xef\xbb\xbfone\r\n", b_txt="two")
        assert load_corpus(f"{folder}/*.txt").train == ("one\r\n",)

    def test_documents_of_white_space_are_dropped(self, tmp_path):
        """Catches a held-out part of nothing but line ends."""
        folder = write(tmp_path, a_txt="one", b_txt="two", c_txt=" \n\t")
        assert load_corpus(f"{folder}/*.txt").heldout == ("two",)

    @pytest.mark.parametrize("content", ["", " \n\n\t "])
    def test_an_empty_corpus_is_refused(self, tmp_path, content):
        """Catches a run on no text at all."""
        folder = write(tmp_path, a_txt=content, b_jsonl=content)
        with pytest.raises(ValueError, match=r"is empty.*'stdlib'"):
            load_corpus(f"{folder}/*.*")

    def test_a_pattern_that_matches_nothing_is_refused(self, tmp_path):
        """Catches a misspelt path that is taken for an empty corpus."""
        with pytest.raises(FileNotFoundError, match=r"missing\.txt.*nothing.*'stdlib'"):
            load_corpus(str(tmp_path / "missing.txt"))

    def test_a_folder_is_refused_with_a_pattern_to_give(self, tmp_path):
        """Catches an IsADirectoryError from deep inside the reader."""
        with pytest.raises(FileNotFoundError, match=r"only folders.*\*\*/\*\.txt"):
            load_corpus(str(tmp_path))

    @pytest.mark.parametrize("spec", ["b.txt", "*.txt"])
    def test_a_fifo_is_refused(self, tmp_path, spec):
        """Catches a wait for ever, and a FIFO that is left out without a word."""
        folder = write(tmp_path, a_txt="one")
        os.mkfifo(tmp_path / "b.txt")
        with pytest.raises(ValueError, match=r"b\.txt must be a regular file.*FIFO"):
            load_corpus(f"{folder}/{spec}")

    def test_a_text_file_in_another_encoding_is_refused(self, tmp_path):
        """Catches a silent replacement of what cannot be read, and an error without the file."""
        folder = write(tmp_path, a_txt="one", b_txt=b"caf\xe9 ")
        with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 text: .* at byte 3"):
            load_corpus(f"{folder}/*.txt")


class TestJsonl:
    def test_reads_objects_and_strings_and_skips_blank_lines(self, tmp_path):
        """Catches a reader of only one of the two forms."""
        folder = write(tmp_path, a_jsonl='{"text": "a\\nb", "id": 1}\r\n\r\n"c"\n')
        assert load_corpus(f"{folder}/a.jsonl") == Corpus(
            train=("a\nb",), heldout=("c",), name=f"{folder}/a.jsonl"
        )

    def test_unicode_line_separators_inside_a_string_do_not_end_a_line(self, tmp_path):
        """Catches str.splitlines(), which cuts valid JSONL at U+2028 and U+0085."""
        text = "a\u2028b\u0085c"
        lines = json.dumps(text, ensure_ascii=False) + "\n" + json.dumps("d") + "\n"
        assert load_corpus(write(tmp_path, a_jsonl=lines) + "/a.jsonl").train == (text,)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": "b"', "is not JSON"),
            ("plain text", "is not JSON"),
            ('{"content": "b"}', r'has no text: \{"content": "b"\}'),
            ('{"text": null}', "has no text"),
            ("[1]", "has no text"),
            ("7", "has no text"),
            ('"\\ud800"', "surrogate"),
            ("[" * 100_000, "is not JSON"),
            ('{"text": "b", "id": ' + "1" * 5000 + "}", "is not JSON"),
        ],
    )
    def test_a_wrong_line_is_named_with_its_file(self, tmp_path, line, message):
        """Catches an error that does not say which of a million lines is wrong."""
        folder = write(tmp_path, a_jsonl=f'"a"\n\n{line}\n')
        with pytest.raises(
            ValueError, match=rf'a\.jsonl, line 3 .*{message}.*under "text"'
        ) as caught:
            load_corpus(f"{folder}/a.jsonl")
        assert "\n" not in str(caught.value)
