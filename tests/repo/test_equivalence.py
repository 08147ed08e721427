"""The committed table of equivalence is that of the tests."""

import pytest
from equivalence import document

pytestmark = pytest.mark.fast


def test_the_document_lists_the_cells_of_the_tests():
    """Fails if a feature or strategy is added, renamed, or made nightly, and the page is not
    written anew."""
    text = document.PATH.read_text(encoding="utf-8")
    shown = {name: figure.startswith("*") for name, figure in document.read(text).items()}
    tested = {document.name_of(cell): cell.nightly for cell in document.all_cells()}
    assert shown == tested, f"Write it anew: {document.COMMAND}"
    assert document.UNKNOWN not in {figure.strip("*") for figure in document.read(text).values()}


def test_the_document_is_as_the_tests_write_it():
    """Fails if the page was edited by hand, or its words have changed in the tests."""
    text = document.PATH.read_text(encoding="utf-8")
    versions = ("TensorFlow ", "Keras ", "Python ")
    lines = zip(text.splitlines(), document.render(document.read(text)).splitlines(), strict=True)
    for committed, written in lines:
        # Other versions than those of the run may be installed.
        assert committed == written or all(word in committed for word in versions)
