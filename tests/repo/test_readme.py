"""The README and the other pages: their code runs and shows what they say, their commands and
links exist."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repo.documented_code import blocks_of

from llmos_tf.scripts.flags import FLAGS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
# README.md first.
PAGES_WITH_CODE = [str(page.relative_to(ROOT)) for page in PAGES if blocks_of(page)]

needs_keras_hub = pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None, reason="keras-hub needs Python 3.11"
)


def run_blocks(folder, *names):
    """What Python blocks of pages print in a process of their own, in an empty folder."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/repo/documented_code.py"), *names],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_keras_hub
def test_python_blocks_run_as_they_stand(tmp_path):
    """Fails if a block of a page raises, also for want of an import, if the README's first example
    trains other weights, or if its traffic is another table."""
    printed = run_blocks(tmp_path, *PAGES_WITH_CODE)
    # Weights are of order 1, and 12 steps of Adam of 1e-3.
    assert "DataParallelStrategy().scope()" in blocks_of(ROOT / "README.md")[0]
    assert float(printed[0].split()[-1]) < 1e-6
    tables = [text for text in printed if text.startswith("| axis | kind")]
    assert len(tables) == 1
    assert tables[0] in README


@needs_keras_hub
@pytest.mark.nightly
@pytest.mark.parametrize(
    "name",
    [f"{page}:{i}" for page in PAGES_WITH_CODE for i in range(len(blocks_of(ROOT / page)))],
)
def test_each_python_block_runs_alone(name, tmp_path):
    """Fails if a block needs what another one has set up, such as virtual devices."""
    run_blocks(tmp_path, name)


@pytest.mark.fast
def test_fragments_are_announced():
    """Fails if a block is left out of the tests and the text does not say that it is no script."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        announced = re.findall(r"fragment[^\n]*\n\n```python fragment$", text, re.MULTILINE)
        marked = re.findall(r"^```python\b", text, re.MULTILINE)
        assert len(marked) == len(blocks_of(page)) + len(announced), page


def test_the_verification_runs_as_it_is_pasted(tmp_path):
    """Fails if the block of the README does not run in an empty folder, or prints another table."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (script,) = (block for block in blocks if "\nllmos-verify" in block)
    # The program of this checkout, installed or not.
    script = script.replace("\nllmos-verify", f"\n{sys.executable} -m llmos_tf.scripts.verify")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    (table,) = (block for block in blocks if block.startswith("mesh "))
    for line in table.splitlines()[:-1]:
        # The figures are roundings, and may be others on another machine.
        first, *_, last = line.split()
        assert re.search(rf"^ *{re.escape(first)}.*{last}$", done.stdout, re.MULTILINE), line
    assert "All agree." in done.stdout


@pytest.mark.fast
def test_the_programs_and_flags_exist():
    """Fails for a command that was renamed, or a flag that is not there any more."""
    found = re.findall(r"llmos-(\w+)((?: +--?[\w=,.:\'*/]+)*)", README)
    assert {name for name, _ in found} == {
        "benchmark",
        "evaluate",
        "generate",
        "plan",
        "train",
        "verify",
    }
    for _, flags in found:
        for flag in re.findall(r"--(\w+)", flags):
            assert flag in FLAGS or flag == "help", flag


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Fails for a link to a file that was moved."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and "NNNN" not in target and "MMMM" not in target:
            assert (page.parent / target).exists(), target
