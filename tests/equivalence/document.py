"""`docs/equivalence.md`: written from what the cells measure, read to check it."""

import itertools
import platform
import re
from pathlib import Path

import keras
import tensorflow as tf

from equivalence.columns import COLUMNS, TITLES
from equivalence.features import FLOAT64, Cell, Feature, cells_of
from equivalence.themes import THEMES

PATH = Path(__file__).resolve().parents[2] / "docs" / "equivalence.md"
COMMAND = "python3 -m pytest tests/equivalence -m '' --write-equivalence"
# Where a feature has no cell on a strategy, and where the cell failed or was never run.
NONE, UNKNOWN = "·", "?"

INTRODUCTION = """# Equivalence with one device

What unmodified Keras scripts train under each strategy, against the same script on one device. A \
figure is the largest difference of any weight, max |Δweight|, after five to thirty steps; `0` is \
bit for bit. Reported losses, metrics, evaluation and prediction are compared in the same tests.

**Everything agrees to rounding.** Scripts compute in float64, where sums in another order differ \
by about 1e-16, and a cell fails above {limit}. Where a row has another limit it says so.

This page is written by the tests:

```
{command}
```

{count} cells. TensorFlow {tensorflow}, Keras {keras}, Python {python}, on virtual CPU devices. \
Figures in *italics* are of nightly tests, the others of every change. A run of some cells keeps \
the figures of the others. The scripts are in [`tests/equivalence/`](../tests/equivalence). \
`fit` in several processes, the models of KerasHub and Keras's own layouts on `tensor` have tests \
of their own: [`tests/multiprocess/`](../tests/multiprocess), \
[`test_keras_hub.py`](../tests/integration/test_keras_hub.py) and \
[`test_keras_layouts.py`](../tests/integration/test_keras_layouts.py).

| strategy | |
|---|---|
{legend}
"""


def name_of(cell: Cell) -> tuple[str, str]:
    """Returns what identifies a cell: titles of its feature and its strategy."""
    return cell.feature.title, cell.column


def figure(difference: float, nightly: bool) -> str:
    """Returns how the document shows a difference."""
    text = "0" if difference == 0 else _short(difference)
    return f"*{text}*" if nightly else text


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def render(figures: dict[tuple[str, str], str]) -> str:
    """Returns the document.

    Args:
        figures: what is shown of each cell; all of them.
    """
    notes: list[str] = []
    tables = [_table(theme, features, figures, notes) for theme, features in THEMES.items()]
    introduction = INTRODUCTION.format(
        limit=_short(FLOAT64.limit),
        command=COMMAND,
        count=len(figures),
        tensorflow=tf.__version__,
        keras=keras.__version__,
        python=platform.python_version(),
        legend="\n".join(f"| {column.title} | {column.explanation} |" for column in COLUMNS),
    )
    listed = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    ending = "\n## Notes\n\n" + "\n".join(listed) + "\n"
    return introduction + "".join(tables) + ending


def _table(theme: str, features: list[Feature], figures: dict, notes: list[str]) -> str:
    lines = [
        f"\n## {theme}\n",
        "| | " + " | ".join(TITLES) + " |",
        "|---|" + "---|" * len(TITLES),
    ]
    for feature in features:
        shown = [figures.get((feature.title, column), NONE) for column in TITLES]
        title = feature.title
        if feature.tolerance is not FLOAT64:
            title += f" (≤ {_short(feature.tolerance.limit)}, {feature.tolerance.name})"
        if feature.note:
            if feature.note not in notes:
                notes.append(feature.note)
            title += f" [[{notes.index(feature.note) + 1}]](#notes)"
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def read(text: str) -> dict[tuple[str, str], str]:
    """Returns what a document shows of each cell."""
    figures = {}
    titles: list[str] = []
    for line in text.splitlines():
        entries = [entry.strip() for entry in line.strip("|").split("|")]
        if line.startswith("| | "):
            titles = entries[1:]
        elif titles and line.startswith("| "):
            title = re.sub(r"( \(≤ [^)]*\))?( \[\[\d+\]\]\(#notes\))?$", "", entries[0])
            pairs = zip(titles, entries[1:], strict=True)
            figures.update({(title, column): shown for column, shown in pairs if shown != NONE})
    return figures


def all_cells() -> list[Cell]:
    """Returns the cells of all themes, in the order of the document."""
    return list(itertools.chain.from_iterable(map(cells_of, THEMES.values())))


def write(measured: dict[tuple[str, str], float]) -> str:
    """Writes the document and returns what to say about it.

    Args:
        measured: differences by cell, from this run; other cells keep what the document has.
    """
    before = read(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    figures = {}
    for cell in all_cells():
        name = name_of(cell)
        if name in measured:
            figures[name] = figure(measured[name], cell.nightly)
        else:
            text = before.get(name, UNKNOWN).strip("*")
            figures[name] = f"*{text}*" if cell.nightly else text
    PATH.write_text(render(figures), encoding="utf-8")
    return f"{PATH.name} is written: {len(measured)} of {len(figures)} cells measured anew."
