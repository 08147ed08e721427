"""The normal run finds bugs that are planted on purpose (`tests/planted_bugs/`)."""

from pathlib import Path

import pytest
from planted_bugs.bugs import BUGS
from planted_bugs.judging import judge

ROOT = Path(__file__).resolve().parents[2]
NAMES = [bug.name for bug in BUGS]


@pytest.mark.fast
@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_a_bug_fits_the_sources(bug):
    # Fails when a source changes and leaves a bug behind that cannot be planted any more.
    assert bug.planted_in((ROOT / bug.path).read_text(encoding="utf-8"))
    assert all((ROOT / test).exists() for test in bug.tests)


@pytest.mark.nightly
@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_a_bug_is_found(bug):
    # Fails when the tests that run with every change would let this bug pass.
    verdict = judge(bug)
    assert verdict.found_by, verdict.output
