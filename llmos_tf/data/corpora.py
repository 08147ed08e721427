"""Corpora: documents as text, split into a training and a held-out part.

The default corpus needs no download: the Python files of the running interpreter's standard
library. `load_corpus` says which files those are.
"""

from __future__ import annotations

import glob
import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from llmos_tf.files.reading import parse_json, read_bytes

# Left out of the default corpus. Tests: many Linux packages of Python ship without them, so the
# corpus would differ between machines of one Python version. Encodings: a hundred near-copies of
# one generated hexadecimal table, which lower the loss of a model that has learnt nothing else.
_STDLIB_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "site-packages",
        "test",
        "tests",
    }
)
# Written when Python was built or by the machine's owner: not the same text on two machines.
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents to train on, and documents kept away from training.

    Attributes:
        train: the documents to train on, in order.
        heldout: the documents to evaluate on; none of them is in `train`.
        name: where the documents come from, for reports.

    Raises:
        ValueError: if either part has no document.

    Example:
        >>> Corpus(train=("a b", "c d"), heldout=("e f",), name="letters").heldout
        ('e f',)
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        for part in ("train", "heldout"):
            if not getattr(self, part):
                raise ValueError(
                    f"Corpus {self.name!r} has no documents in its part {part!r}; both parts need "
                    "at least one."
                )


def load_corpus(spec: str, heldout_fraction: float = 0.05) -> Corpus:
    """Reads a corpus and holds out its last part.

    `"stdlib"` stands for the `.py` files of the running Python's standard library, in sorted
    order, without its tests, its generated `encodings` tables, installed packages and files that
    are not UTF-8: about 10 MB. The corpus is named after the Python version, because bits per byte
    compare only within one. A file that happens to be called `stdlib` is read as `./stdlib`.

    Anything else is a path or a glob pattern (`**` descends into folders). A `.jsonl` file holds
    one document a line, either a JSON string or an object with a string under "text"; any other
    file is one document of UTF-8 text. Files are read in sorted order. Documents of nothing but
    white space are dropped.

    Of several documents the last `heldout_fraction` is held out, at least one; of a single
    document its tail, cut between two characters.

    Args:
        spec: `"stdlib"`, a path, or a glob pattern.
        heldout_fraction: the share of the documents (or of the one document) to hold out, between
            0 and 1.

    Returns:
        The corpus, both parts of it not empty.

    Raises:
        FileNotFoundError: if no file matches `spec`.
        ValueError: if `heldout_fraction` is out of range, a file is not a regular one, not UTF-8
            text or not valid JSONL, or there is too little text to split.

    Example:
        >>> corpus = load_corpus("stdlib")
        >>> len(corpus.train) > 10 * len(corpus.heldout)
        True
    """
    if not 0.0 < heldout_fraction < 1.0:
        raise ValueError(
            f"heldout_fraction must lie between 0 and 1, both excluded; received "
            f"{heldout_fraction!r}. 0.05 holds out the last twentieth."
        )
    if spec == "stdlib":
        documents = _read_stdlib(Path(sysconfig.get_path("stdlib")))
        name = f"stdlib-{platform.python_version()}"
    else:
        files, found = _matching_files(spec)
        if not files:
            raise FileNotFoundError(
                f"No file for the corpus {spec!r}: in {os.getcwd()!r} it matches {found}. Give "
                "'stdlib', the path of a text or .jsonl file, or a quoted glob pattern such as "
                "'texts/**/*.txt'."
            )
        documents = []
        for path in files:
            documents.extend(_read_jsonl(path) if path.suffix == ".jsonl" else [_read_text(path)])
        name = spec
    documents = [document for document in documents if document and not document.isspace()]
    if not documents:
        raise ValueError(
            f"The corpus {spec!r} is empty: its files hold no documents, or only white space. Give "
            "text files, .jsonl files with text in them, or 'stdlib' for the Python files of the "
            "standard library (not available where Python keeps its library in a zip file)."
        )
    train, heldout = _split(documents, heldout_fraction, spec)
    return Corpus(train=tuple(train), heldout=tuple(heldout), name=name)


def _split(documents: list[str], fraction: float, spec: str) -> tuple[list[str], list[str]]:
    """Returns the documents in two parts, neither of them empty."""
    if len(documents) > 1:
        num_heldout = min(max(1, round(len(documents) * fraction)), len(documents) - 1)
        return documents[:-num_heldout], documents[-num_heldout:]
    (document,) = documents
    if len(document) < 2:
        raise ValueError(
            f"The corpus {spec!r} is one document of {len(document)} character: too little to hold "
            "a part of it out. Give a longer text, or several documents."
        )
    num_heldout = min(max(1, round(len(document) * fraction)), len(document) - 1)
    return [document[:-num_heldout]], [document[-num_heldout:]]


def _read_stdlib(root: Path) -> list[str]:
    """Returns the text of the standard library's Python files, in sorted order."""
    paths = []
    for folder, subfolders, files in os.walk(root):
        # Pruned in place, so that a large site-packages is never walked.
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _STDLIB_SKIPPED_FOLDERS and not name.startswith(_STDLIB_SKIPPED_PREFIXES)
        ]
        paths.extend(
            Path(folder, name)
            for name in files
            if name.endswith(".py") and not name.startswith(_STDLIB_SKIPPED_PREFIXES)
        )
    documents = []
    # Sorted by the relative name with "/": the same order on every operating system.
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            # Bytes, not text mode: the corpus keeps its line ends, and their bytes are counted.
            documents.append(read_bytes(path).decode("utf-8"))
        except UnicodeDecodeError:
            continue
    return documents


def _matching_files(spec: str) -> tuple[list[Path], str]:
    """Returns the files that a path or pattern names, sorted, and in words what it matches."""
    pattern = os.path.expanduser(spec)
    # A file whose name has brackets in it is a path first and a pattern second.
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    # A FIFO or a device among them is refused when it is read, by name.
    files = [Path(match) for match in matches if not os.path.isdir(match)]
    found = f"only folders, such as {matches[0]!r}" if matches else "nothing"
    return files, f"{len(files)} files" if files else found


def _read_text(path: Path) -> str:
    """Returns a file's text without a byte order mark, its line ends as they are."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}. Convert it "
            "(iconv -t UTF-8), or leave it out of the pattern."
        ) from error


def _read_jsonl(path: Path) -> list[str]:
    """Returns the documents of a JSONL file, blank lines left out."""
    documents = []
    # Not splitlines(): it also cuts at U+2028 and others, which may stand inside a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        expected = 'each line must be a JSON string, or an object with a string under "text".'
        try:
            value = parse_json(line, f"{path}, line {number}")
        except ValueError as error:
            raise ValueError(f"{error} Of a .jsonl file {expected}") from error
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            shown = line.strip()
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise ValueError(f"{path}, line {number} has no text: {shown}; {expected}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{path}, line {number} holds half of a surrogate pair, which is not text in "
                f"UTF-8 ({error.reason} at character {error.start}); {expected}"
            ) from error
        documents.append(text)
    return documents
