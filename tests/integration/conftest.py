"""Runs a program of the project in this process, as the command line would."""

import contextlib
import io
from typing import NamedTuple

import pytest
from absl import flags

FLAGS = flags.FLAGS


class Finished(NamedTuple):
    """How a program ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def run_program(monkeypatch):
    """(module, *arguments) -> `Finished`. Every call starts with the flags' defaults."""

    def run(module, *arguments):
        FLAGS.unparse_flags()
        for name in FLAGS:
            if FLAGS[name].present:
                FLAGS[name].unparse()
        name = module.__name__.rpartition(".")[2]
        argv = [f"llmos-{name}", *map(str, arguments)]
        monkeypatch.setattr("sys.argv", argv)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.run()
                status = 0
            except SystemExit as end:
                status = end.code or 0
        return Finished(status, out.getvalue(), err.getvalue())

    yield run
    FLAGS.unparse_flags()
    FLAGS(["pytest"])
