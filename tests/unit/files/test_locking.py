"""Locks: one holder at a time, whatever becomes of it, and nothing left behind."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from llmos_tf.files.locking import LOCK_FILE, FolderInUseError, claimed, locked

pytestmark = pytest.mark.fast

HOLDER = """
import sys, time
from pathlib import Path
from llmos_tf.files.locking import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_another_process_is_named_and_a_dead_one_is_not_waited_for(tmp_path):
    """Fails if two programs claim a folder, the second does not learn by whom it is held, or one
    that was killed holds it for ever."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "claimed\n"
            expected = (
                f"The folder {tmp_path} is in use by process {holder.pid} on the host "
                f"{socket.gethostname()}. Wait until it ends, or name another folder."
            )
            with pytest.raises(FolderInUseError, match=re.escape(expected)), claimed(tmp_path):
                raise AssertionError("claimed twice")
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert (tmp_path / LOCK_FILE).exists()
            with claimed(tmp_path):
                pass
        finally:
            holder.kill()
    assert list(tmp_path.iterdir()) == []


def test_threads_take_turns(tmp_path):
    """Fails if two hold the lock at a time, or one locks a file that another has removed."""
    holders, most = set(), []

    def work(number):
        for _ in range(40):
            with locked(tmp_path, 60.0, "") as is_locked:
                assert is_locked
                holders.add(number)
                most.append(len(holders))
                time.sleep(0)
                holders.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 160
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_holder_that_ended_is_no_lock(tmp_path, monkeypatch):
    """Fails if a process locks the file that the last holder has just removed, and the next one
    another file of that name."""
    flock = fcntl.flock

    def flock_after_removal(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        (tmp_path / LOCK_FILE).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with (
        locked(tmp_path, 60.0, ""),
        pytest.raises(FolderInUseError),
        locked(tmp_path, 0.0, ""),
    ):
        raise AssertionError("locked twice")


def test_waiting_has_an_end(tmp_path):
    """Fails if a holder that does not end is waited for for ever, or not at all."""
    begin = time.monotonic()
    with (
        locked(tmp_path, 0.0, ""),
        pytest.raises(FolderInUseError, match=rf"process {os.getpid()} on .* Do so\.$"),
        locked(tmp_path, 0.1, "Do so."),
    ):
        pass
    assert time.monotonic() - begin >= 0.1


def test_a_claim_leaves_no_empty_folder(tmp_path):
    """Fails if a program that is refused leaves folders, or one that wrote loses them."""
    folder = tmp_path / "runs" / "one"
    with claimed(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    with claimed(folder):
        (folder / "result").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Fails if nothing can be saved there, or if nobody is told that it is not kept apart."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path, 0.0, "") as is_locked:
        assert not is_locked
