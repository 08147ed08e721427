"""The README: its example runs and shows what it says, its commands and links exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmos_tf.scripts.flags import FLAGS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


def test_the_example_trains_the_same_weights(tmp_path):
    """Fails if the first example of the README does not run, or its weights differ by more than
    float32 rounding."""
    (code, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "DataParallelStrategy().scope()" in code
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # Weights are of order 1, and 12 steps of Adam of 1e-3.
    assert float(done.stdout.split()[-1]) < 1e-6


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
