"""Writes: a file is there as a whole, or as it was, and the error names it."""

import errno
import json
import os
import resource
import threading
from pathlib import Path

import matplotlib.figure
import pytest

from llmos_tf.files.pictures import write_png
from llmos_tf.files.writing import write_bytes, write_json

pytestmark = pytest.mark.fast


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    """Fails if the content is another one, a reader sees half of it, a link becomes a file, or a
    temporary file is left."""
    path, link = tmp_path / "sub" / "out.json", tmp_path / "link.json"
    path.parent.mkdir()
    link.symlink_to(path)
    for value in ({"a": 1}, {"a": [2.5, "é"]}):
        write_json(link, value)
        assert json.loads(path.read_text()) == value
    with path.open() as reader:
        write_json(link, 3)
        # As a whole, it is another file.
        assert json.loads(reader.read()) == value
    assert link.is_symlink()
    assert listing(path.parent) == ["out.json"]
    (tmp_path / "ordinary").write_text("")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    write_png(tmp_path / "it.png", matplotlib.figure.Figure(figsize=(1, 1)), dpi=20)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    """Fails if a full disk empties the file, leaves half of one, or is reported without a path."""
    path = tmp_path / "out.json"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # As on a full disk, the system refuses to write from here on.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_bytes(path, b"x" * (1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old"
    assert listing(tmp_path) == ["out.json"]


def test_a_crash_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    """Fails if the file has its name before its content is on disk."""
    path = tmp_path / "out.json"
    path.write_text("old")

    def crash(descriptor):
        raise SystemExit

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(SystemExit):
        write_bytes(path, b"new")
    assert path.read_text() == "old"


def test_where_no_file_can_be(tmp_path):
    """Fails if the error names a temporary file, or no file at all."""
    for path, kind in ((tmp_path / "no" / "out", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind) as caught:
            write_bytes(path, b"x")
        assert caught.value.filename == str(path)


def test_pipes_and_devices_are_written_to(tmp_path):
    """Fails if a FIFO or /dev/stdout is replaced by a file, or one that nobody reads is waited
    for."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="fifo") as caught:
        write_bytes(fifo, b"x")
    assert caught.value.errno == errno.ENXIO
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    reader = threading.Thread(target=write_bytes, args=(fifo, b"content"))
    reader.start()
    reader.join()
    assert os.read(descriptor, 100) == b"content"
    os.close(descriptor)
    assert fifo.is_fifo()
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_bytes("/dev/full", b"x")
    write_bytes("/dev/null", b"x")
    assert Path("/dev/null").is_char_device()
