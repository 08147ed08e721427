"""Reads: what is no file, too large or no JSON is refused by name, and nothing waits."""

import errno
import io
import os
import socket

import pytest

from llmos_tf.files import reading
from llmos_tf.files.errors import naming
from llmos_tf.files.reading import parse_json, read_bytes, require_regular

pytestmark = pytest.mark.fast


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS = {
    "a folder": os.mkdir,
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a character device": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, kind):
    """Fails if a FIFO is opened, which waits for ever, or the error does not name the path."""
    # Short, as the path of a socket has to be.
    monkeypatch.chdir(tmp_path)
    KINDS[kind]("it")
    for read in (read_bytes, require_regular):
        with pytest.raises(ValueError, match=f"it must be a regular file. Received: {kind}"):
            read("it")


def test_a_file_is_read_up_to_its_limit(tmp_path):
    """Fails if the limit is off by one, a link is refused, or a huge file is read first."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(path)
    assert read_bytes(tmp_path / "link") == read_bytes(path, 3) == b"abc"
    with pytest.raises(ValueError, match=r"file must have at most 2 bytes"):
        read_bytes(path, 2)
    with pytest.raises(FileNotFoundError, match="missing"):
        read_bytes(tmp_path / "missing")


def test_a_file_that_is_larger_than_memory_is_named(tmp_path, monkeypatch):
    """Fails for a bare MemoryError."""
    path = tmp_path / "file"
    path.write_bytes(b"abc")

    class Huge(io.FileIO):
        def read(self, size=-1):
            raise MemoryError

    monkeypatch.setattr(reading, "open", lambda path, mode: Huge(path), raising=False)
    with pytest.raises(ValueError, match=r"file does not fit into this machine's memory: 3 bytes"):
        read_bytes(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", b"\xff", b"\xff\xfe[\x00"])
def test_what_is_no_json_is_named(text):
    """Fails for a RecursionError, an error about digits, or one that does not say where."""
    with pytest.raises(ValueError, match=r"^a\.jsonl, line 3 is not JSON \(.+\)\.$"):
        parse_json(text, "a.jsonl, line 3")
    assert parse_json("[1]", "a") == parse_json(b"[1]", "a") == [1]


def test_a_system_error_gets_the_name_of_the_file():
    """Fails if a full disk is reported without the file, as another class, or a custom message
    is lost."""
    with (
        pytest.raises(PermissionError, match=r"Permission denied: 'a/file'") as caught,
        naming("a/file"),
    ):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert caught.value.filename == "a/file"
    with pytest.raises(OSError, match=r"^no$"), naming("a/file"):
        raise OSError("no")
