"""The bigram baseline against a count by hand, and bits per byte against their definition."""

import collections
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf.data.baselines import bigram_bits_per_byte, bits_per_byte, count_bytes

pytestmark = pytest.mark.fast

TEXTS = st.lists(st.text("abé", min_size=1, max_size=8), min_size=1, max_size=4)


def bits_by_hand(train, heldout, smoothing):
    """Returns the total bits, with dictionaries and one document at a time."""
    counts = collections.defaultdict(collections.Counter)
    for text in train:
        tokens = [*text.encode(), 255]
        for first, second in itertools.pairwise(tokens):
            counts[first][second] += 1
    total = 0.0
    for text in heldout:
        tokens = [*text.encode(), 255]
        for first, second in itertools.pairwise(tokens):
            row = counts[first]
            total -= math.log2((row[second] + smoothing) / (row.total() + 256 * smoothing))
    return total


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([0.01, 0.5, 2.0]))
def test_is_the_count_by_hand(train, heldout, smoothing):
    """Catches pairs across documents, a transposed table, nats for bits."""
    value = bigram_bits_per_byte(train, heldout, smoothing=smoothing)
    expected = bits_by_hand(train, heldout, smoothing) / count_bytes(heldout)
    assert value == pytest.approx(expected, rel=1e-9)


def test_long_documents_are_counted_as_short_ones():
    """Catches another count where a document is longer than the table of pairs."""
    long = "abcab" * 20_000
    value = bigram_bits_per_byte([long, "ab"], [long, "b"])
    expected = bits_by_hand([long, "ab"], [long, "b"], 0.1) / count_bytes([long, "b"])
    assert value == pytest.approx(expected, rel=1e-9)


def test_unseen_contexts_cost_eight_bits():
    """Catches a smoothing that does not sum to one over the vocabulary."""
    # Four bytes, of which the first is not predicted, and the end of the document: four targets.
    assert bigram_bits_per_byte(["aaaa"], ["bcde"]) == pytest.approx(8.0)


def test_the_end_of_a_document_is_predicted():
    """Catches a numerator without the ends, which flatters a model on short documents."""
    assert bigram_bits_per_byte(["a"], ["b", "c"]) == pytest.approx(8.0)


def test_a_learnt_pattern_is_cheap():
    """Catches a model scored on its own held-out counts or not counted at all."""
    assert bigram_bits_per_byte(["ab" * 1000], ["ab" * 10]) < 1.0
    assert bigram_bits_per_byte(["ba" * 3], ["ab" * 10]) > 2.0


def test_documents_are_counted_in_bytes():
    """Catches characters counted in place of bytes."""
    assert count_bytes(["é!", b"\xff\xff", ""]) == 5
    assert bits_per_byte(3 * math.log(2.0), 2) == pytest.approx(1.5)
    assert type(bits_per_byte(np.float32(1.0), 2)) is float


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smoothing": 0.0}, "infinitely many bits"),
        ({"smoothing": float("nan")}, "smoothing"),
        ({"heldout": []}, "at least one byte; received 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    """Catches a logarithm of nothing and a division by zero."""
    with pytest.raises(ValueError, match=message):
        bigram_bits_per_byte(**({"train": ["abc"], "heldout": ["abc"]} | arguments))
