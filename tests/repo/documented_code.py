"""The Python blocks of the pages, and a program that runs them.

``python3 tests/repo/documented_code.py README.md:1 docs/tpu.md`` runs the second block of one page
and all blocks of another as they stand, each in a fresh namespace. What each has printed is written
as an element of a JSON list, after everything else.
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A block that is not to be run is marked "```python fragment", and the text says why.
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks_of(page: Path) -> list[str]:
    """Returns the Python blocks of a page, without its fragments."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(block: str, name: str) -> str:
    """Runs a block as a script would; returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, name, "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def main(chosen: list[str]) -> None:
    """Runs blocks, each named by page and number, or all of a page, and writes what they print."""
    output = []
    for name in chosen:
        page, _, number = name.partition(":")
        blocks = blocks_of(ROOT / page)
        for i in [int(number)] if number else range(len(blocks)):
            output.append(run(blocks[i], f"{page}, Python block {i}"))
    print(json.dumps(output))


if __name__ == "__main__":
    main(sys.argv[1:])
