"""Packing: every token is a target once, in order, and only where it should count."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf.data.packing import PackedTokens, pack_documents

pytestmark = pytest.mark.fast

END = 99
DOCUMENTS = st.lists(st.lists(st.integers(0, 98), max_size=7), min_size=1, max_size=6).filter(any)
LENGTHS = st.integers(1, 9)


def stream_of(documents):
    """Returns the concatenated documents, and which of its tokens start one."""
    stream, starts = [], []
    for document in documents:
        starts.append(len(stream))
        stream += [*document, END]
    return stream, starts


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, LENGTHS)
def test_each_token_counts_once_except_the_first_of_a_document(documents, length):
    """Catches tokens lost or repeated at a cut, and loss across documents or on padding."""
    packed = pack_documents(documents, length, END)
    stream, starts = stream_of(documents)
    expected = [token for index, token in enumerate(stream) if index not in starts]
    assert packed.targets[packed.weights == 1.0].tolist() == expected
    assert set(np.unique(packed.weights)) <= {0.0, 1.0}
    assert packed.num_targets == len(expected)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, LENGTHS)
def test_the_order_is_kept_and_targets_follow_their_inputs(documents, length):
    """Catches targets that are not shifted by one, and windows that leave out their last token."""
    packed = pack_documents(documents, length, END)
    stream, _ = stream_of(documents)
    flat_inputs, flat_targets = packed.inputs.ravel(), packed.targets.ravel()
    assert flat_targets[: len(stream) - 1].tolist() == stream[1:]
    assert flat_inputs[: len(stream) - 1].tolist() == stream[:-1]
    assert (flat_targets[:-1] == flat_inputs[1:]).all()
    assert (flat_targets[len(stream) - 1 :] == END).all()
    assert not packed.weights.ravel()[len(stream) - 1 :].any()
    # No window of nothing but padding.
    assert packed.num_sequences == -(-(len(stream) - 1) // length)


@settings(max_examples=50, deadline=None)
@given(DOCUMENTS, LENGTHS)
def test_arrays_and_lists_of_any_integer_type_pack_alike(documents, length):
    """Catches a result that depends on how a tokenizer returns its ids."""
    packed = pack_documents(documents, length, END)
    arrays = pack_documents((np.array(d, np.uint8) for d in documents), length, np.int64(END))
    assert packed.fingerprint == arrays.fingerprint


def test_shapes_types_and_memory():
    """Catches a copy of the stream for each of inputs and targets."""
    packed = pack_documents([[1, 2, 3], [4, 5]], 4, 0)
    for array in (packed.inputs, packed.targets, packed.weights):
        assert array.shape == (packed.num_sequences, packed.sequence_length) == (2, 4)
    assert packed.inputs.dtype == packed.targets.dtype == np.int32
    assert packed.weights.dtype == np.float32
    assert np.shares_memory(packed.inputs, packed.tokens)
    assert np.shares_memory(packed.targets, packed.tokens)


def test_the_arrays_cannot_be_written():
    """Catches data that changes under a fingerprint already computed."""
    tokens, weights = np.arange(5, dtype=np.int32), np.ones((2, 2), np.float32)
    packed = PackedTokens(tokens=tokens, weights=weights)
    for array in (packed.tokens, packed.inputs, packed.targets, packed.weights):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    tokens[0] = 7  # The caller's own array is left as it was.


def test_the_fingerprint_sees_tokens_weights_and_lengths():
    """Catches a resumed run that goes on with other data of the same size."""
    documents = [[1, 2, 3], [4, 5]]
    variants = [
        pack_documents(documents, 3, 0),
        pack_documents(documents, 6, 0),
        pack_documents([[1, 2, 3], [4, 6]], 3, 0),
        pack_documents([[1, 2], [0, 4, 5]], 3, 0),
        pack_documents([[1, 2, 3, 0, 4, 5]], 3, 0),
    ]
    assert len({packed.fingerprint for packed in variants}) == len(variants)
    assert variants[0].fingerprint == pack_documents(documents, 3, 0).fingerprint


def test_the_fingerprint_is_that_of_the_record():
    """Catches a change of the hash, which would refuse every stored state."""
    fingerprint = pack_documents([[1, 2, 3], [4, 5]], 4, 0).fingerprint
    assert fingerprint == "8497a40649b4270c4e7e845825b8c97d"


@pytest.mark.parametrize(
    ("documents", "length", "end", "message"),
    [
        ([], 4, 0, "0 documents without a single token"),
        ([[], []], 4, 0, "2 documents without a single token"),
        ([[1]], 0, 0, "sequence_length must be at least 1; received 0"),
        ([[1], [0.5]], 4, 0, "document 1 an array of float64"),
        ([[[1, 2]]], 4, 0, r"document 0 .* shape \[1, 2\]"),
        ([[1, -1]], 4, 0, "document 0 ids from -1 to 1"),
        ([[2**31]], 4, 0, "document 0 ids from 2147483648"),
        ([[1]], 4, -1, "end_of_document ids from -1"),
        ([[1]], 4, None, "end_of_document an array of object"),
    ],
)
def test_what_cannot_be_packed_is_refused(documents, length, end, message):
    """Catches ids that wrap around in int32, and an empty corpus that trains on padding."""
    with pytest.raises(ValueError, match=message):
        pack_documents(documents, length, end)


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [
        (np.zeros(4, np.int32), np.zeros((2, 2), np.float32)),
        (np.zeros(5, np.int64), np.zeros((2, 2), np.float32)),
        (np.zeros(5, np.int32), np.zeros((2, 2), np.float64)),
        (np.zeros(5, np.int32), np.zeros(4, np.float32)),
        (np.zeros(1, np.int32), np.zeros((0, 4), np.float32)),
    ],
)
def test_packed_tokens_of_other_shapes_are_refused(tokens, weights):
    """Catches a stream without the last target."""
    with pytest.raises(ValueError, match=r"\[N \* S \+ 1\]"):
        PackedTokens(tokens=tokens, weights=weights)
