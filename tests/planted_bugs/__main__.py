"""Plants bugs in a copy of the sources and shows which test of the normal run finds each.

Usage, from the root of a checkout:

    PYTHONPATH=tests python3 -m planted_bugs [PART OF A NAME ...]

Exit status 1 when a bug is not found.
"""

import sys

from planted_bugs.bugs import BUGS
from planted_bugs.judging import judge


def main(words: list[str]) -> int:
    chosen = [bug for bug in BUGS if not words or any(word in bug.name for word in words)]
    missed = 0
    for number, bug in enumerate(chosen, start=1):
        verdict = judge(bug)
        missed += not verdict.found_by
        found = verdict.found_by[0] if verdict.found_by else "NOT FOUND"
        print(f"{number}/{len(chosen)}  {bug.name}: {found} ({verdict.seconds:.0f} s)", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
