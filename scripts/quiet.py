"""A start without TensorFlow's notes: on missing GPUs, on its own build, on double registrations.

Two means, as TensorFlow has two phases. Once it has read TF_CPP_MIN_LOG_LEVEL it prints what that
asks for. Before, while its libraries are loaded, it prints everything, and lines are filtered out
of stderr. Neither is done where the user has set TF_CPP_MIN_LOG_LEVEL.
"""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

_VARIABLE = "TF_CPP_MIN_LOG_LEVEL"
# Fatal errors only. What fails is raised as a Python exception as well, while lines of lower levels
# appear on healthy machines: a missing GPU is an error, the end of a dataset a warning.
_LEVEL = "3"
# Passes on all lines but notes and warnings of TensorFlow, and errors about what is registered
# twice. It is a process, so that it also passes on the last words of one that is aborted.
_FILTER = r"""
import re, sys
note = re.compile(
    rb"([IW]\d{4} \d\d:\d\d:|\d{4}-\d\d-\d\d \S+: [IW] |WARNING: All log messages before absl)"
    rb"|.*Unable to register cu\w+ factory"
)
for line in sys.stdin.buffer:
    if not note.match(line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """Silences TensorFlow's notes: entered around its import, and lasting for what it prints later.

    Yields:
        Nothing.
    """
    # TensorFlow announces each strategy, and would do so above the program's own first line.
    logging.getLogger("tensorflow").setLevel(logging.WARNING)
    if _VARIABLE in os.environ or "tensorflow" in sys.modules:
        yield
        return
    os.environ[_VARIABLE] = _LEVEL
    sys.stderr.flush()
    stderr = os.dup(2)
    # In a session of its own, so that Ctrl-C does not end it first.
    child = subprocess.Popen(
        [sys.executable, "-ISc", _FILTER],
        stdin=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
    try:
        yield
    finally:
        sys.stderr.flush()
        # Closes the pipe, whereupon the filter ends.
        os.dup2(stderr, 2)
        os.close(stderr)
        child.wait()
