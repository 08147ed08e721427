"""What reaches stderr when a program starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[3]

# A program whose work prints, in place of TensorFlow's libraries, while it is imported.
NOTES = [
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
    "I0000 00:00:1796082430.682807   12608 port.cc:153] oneDNN custom operations are on.",
    "W0000 00:00:1796082430.682807   12608 placer.cc:177] computation placer already registered",
    "2026-11-30 10:00:00.123456: I tensorflow/core/platform/cpu_feature_guard.cc:210] This binary",
    "E0000 00:00:1796082430.682807   12608 cuda.cc:51] Unable to register cuDNN factory: twice",
]
ERRORS = [
    "E0000 00:00:1796082430.682807   12608 blas.cc:31] out of memory",
    "F0000 00:00:1796082430.682807   12608 guard.cc:31] this machine has no AVX",
    "Traceback (most recent call last):",
]
CODE = """
import os, sys
from llmos_tf.scripts.quiet import quiet_start
with quiet_start():
    for line in {lines!r}:
        os.write(2, line.encode() + b"\\n")
    {ending}
os.write(2, b"later\\n")
print(os.environ.get("TF_CPP_MIN_LOG_LEVEL"))
"""


def start(ending="pass", **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    return subprocess.run(
        [sys.executable, "-c", CODE.format(lines=NOTES + ERRORS, ending=ending)],
        capture_output=True,
        text=True,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
    )


def test_notes_are_left_out_and_errors_are_not():
    """Fails if a program begins with lines about GPUs that are not there, or an error is lost."""
    done = start()
    assert done.stderr.splitlines() == [*ERRORS, "later"]
    assert done.stdout == "3\n"


def test_the_last_words_of_a_process_are_passed_on():
    """Fails if the reason is lost why TensorFlow ended the process while it was loaded."""
    for ending in ("os.abort()", "raise SystemExit(2)"):
        done = start(ending)
        assert done.returncode in (-6, 2)
        assert done.stderr.splitlines() == ERRORS


def test_a_user_who_asks_for_notes_gets_them():
    """Fails if a program overrules its user's own level."""
    done = start(TF_CPP_MIN_LOG_LEVEL="0")
    assert done.stderr.splitlines() == [*NOTES, *ERRORS, "later"]
    assert done.stdout == "0\n"
