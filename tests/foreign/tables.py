"""The counts of a comparison, as a table."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

COLUMNS = ("tests", "passed", "failed", "skipped", "excepted", "not reproducible")


def failed(lines: Sequence[dict[str, Any]], unstable: Collection[str] = ()) -> list[dict[str, Any]]:
    """Returns the reports of tests that fail under a strategy.

    Args:
        lines: the reports of the run under the strategy.
        unstable: tests that differ in two runs on one device. They do not count.
    """
    bad = ("failed", "died")
    return [line for line in lines if line["outcome"] in bad and line["test"] not in unstable]


def table(
    record: Sequence[dict[str, Any]],
    runs: Mapping[str, Sequence[dict[str, Any]]],
    unstable: Collection[str] = (),
) -> str:
    """Returns the table of all runs.

    Args:
        record: reports of the run that wrote the results of one device.
        runs: strategy to the reports of its run.
        unstable: tests that differ in two runs on one device.
    """
    rows = [("strategy", *COLUMNS)]
    for name, lines in runs.items():
        counts = Counter(
            "not reproducible" if line["test"] in unstable else line["outcome"] for line in lines
        )
        counts["failed"] += counts["died"]
        counts["tests"] = len(lines)
        rows.append((name, *(str(counts[column]) for column in COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    left_out = Counter(line["outcome"] for line in record if line["outcome"] != "passed")
    reasons = ", ".join(f"{count} {outcome}" for outcome, count in sorted(left_out.items()))
    return "\n".join([*text, f"Left out: {reasons or 'none'} on one device."])
