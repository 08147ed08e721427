"""Batches: every sequence once an epoch, static shapes, and an exact way back."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_tf.data.iterator import BatchIterator
from llmos_tf.data.packing import PackedTokens

pytestmark = pytest.mark.fast

LENGTH = 2


def packed_of(num_sequences, offset=0):
    """Returns sequences that tell their own index: `inputs[n, 0] == n * LENGTH + offset`."""
    tokens = np.arange(num_sequences * LENGTH + 1, dtype=np.int32) + offset
    return PackedTokens(tokens=tokens, weights=np.ones((num_sequences, LENGTH), np.float32))


def indices(batch):
    return (batch[0][:, 0] // LENGTH).tolist()


def assert_same(batch, other):
    for array, expected in zip(batch, other, strict=True):
        np.testing.assert_array_equal(array, expected)


SIZES = {"num_sequences": st.integers(1, 12), "batch_size": st.integers(1, 30)}


class TestOrder:
    @settings(max_examples=60, deadline=None)
    @given(**SIZES, seed=st.integers(0, 2**64 - 1), shuffle=st.booleans())
    def test_each_epoch_holds_each_sequence_once(self, num_sequences, batch_size, seed, shuffle):
        """Catches sequences lost at an epoch's end, short batches, and batches over the corpus."""
        batches = BatchIterator(packed_of(num_sequences), batch_size, seed, shuffle)
        num_batches = -(-3 * num_sequences // batch_size)
        drawn = []
        for _ in range(num_batches):
            batch = next(batches)
            assert all(array.shape == (batch_size, LENGTH) for array in batch)
            drawn += indices(batch)
        for epoch in range(3):
            order = drawn[epoch * num_sequences : (epoch + 1) * num_sequences]
            assert sorted(order) == list(range(num_sequences))
            assert shuffle or order == sorted(order)

    def test_epochs_and_seeds_have_orders_of_their_own(self):
        """Catches a permutation drawn once, and a seed that is not used."""

        def orders(seed):
            batches = BatchIterator(packed_of(50), 50, seed)
            return [tuple(indices(next(batches))) for _ in range(3)]

        assert len({*orders(0), *orders(1)}) == 6
        assert orders(0) == orders(0)

    def test_the_seed_and_the_epoch_do_not_stand_for_each_other(self):
        """Catches seed + epoch as the key: run 1's first epoch would be run 0's second."""
        first, second = (BatchIterator(packed_of(50), 50, seed) for seed in (0, 1))
        next(first)
        assert indices(next(first)) != indices(next(second))

    def test_the_order_is_that_of_the_record(self):
        """Catches a change of the derivation, after which old runs resume on other data."""
        assert indices(next(BatchIterator(packed_of(8), 8, seed=7))) == [4, 1, 6, 3, 2, 7, 5, 0]

    def test_the_batch_size_does_not_change_the_order(self):
        """Catches an order per batch, which no comparison of batch sizes survives."""
        small, large = BatchIterator(packed_of(10), 2, 3), BatchIterator(packed_of(10), 20, 3)
        drawn = [index for _ in range(10) for index in indices(next(small))]
        assert drawn == indices(next(large))


class TestOnePass:
    @settings(max_examples=60, deadline=None)
    @given(**SIZES, shuffle=st.booleans())
    def test_every_sequence_counts_once_and_shapes_are_static(
        self, num_sequences, batch_size, shuffle
    ):
        """Catches a last batch that is dropped, short, or filled with rows that count."""
        packed = packed_of(num_sequences)
        batches = list(BatchIterator(packed, batch_size, 0, shuffle, repeat=False))
        assert len(batches) == -(-num_sequences // batch_size)
        for x, y, weights in batches:
            assert x.shape == y.shape == weights.shape == (batch_size, LENGTH)
            assert (x.dtype, y.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
        counted = np.concatenate([x[weights > 0.0] for x, _, weights in batches])
        assert sorted(counted) == packed.inputs.ravel().tolist()
        assert sum(weights.sum() for _, _, weights in batches) == packed.num_targets

    def test_the_end_stays_the_end(self):
        """Catches an iterator that starts anew after StopIteration."""
        batches = BatchIterator(packed_of(2), 2, 0, repeat=False)
        assert len(list(batches)) == 1
        assert list(batches) == []
        resumed = BatchIterator(packed_of(2), 2, 0, repeat=False)
        resumed.restore(batches.state())
        assert list(resumed) == []

    def test_targets_and_weights_come_with_their_inputs(self):
        """Catches rows of y or weights taken in another order than those of x."""
        # Weights of their own for each row: real ones agree in most rows.
        weights = np.arange(10, dtype=np.float32).reshape(5, LENGTH)
        packed = PackedTokens(tokens=np.arange(11, dtype=np.int32) ** 2, weights=weights)
        rows = {
            tuple(x): (tuple(y), tuple(weights))
            for x, y, weights in zip(packed.inputs, packed.targets, packed.weights, strict=True)
        }
        x, y, weights = next(BatchIterator(packed, packed.num_sequences, seed=0))
        assert x.tolist() != packed.inputs.tolist()
        drawn = {tuple(x[n]): (tuple(y[n]), tuple(weights[n])) for n in range(len(x))}
        assert drawn == rows

    def test_a_batch_can_be_written_without_touching_the_corpus(self):
        """Catches a view of the corpus handed out as a batch."""
        packed = packed_of(4)
        x, _, weights = next(BatchIterator(packed, 4, 0, shuffle=False))
        x[:], weights[:] = -1, -1.0
        assert packed.tokens.min() == 0
        assert packed.weights.min() == 1.0


class TestResume:
    @settings(max_examples=60, deadline=None)
    @given(
        **SIZES,
        seed=st.integers(0, 2**64 - 1),
        shuffle=st.booleans(),
        repeat=st.booleans(),
        steps=st.integers(0, 6),
    )
    def test_a_restored_iterator_goes_on_exactly(
        self, num_sequences, batch_size, seed, shuffle, repeat, steps
    ):
        """Catches a state that forgets the epoch, the position, or the order in force."""
        packed = packed_of(num_sequences)
        batches = BatchIterator(packed, batch_size, seed, shuffle, repeat)
        for _ in range(steps):
            next(batches, None)
        state = json.loads(json.dumps(batches.state()))
        other_seed = (seed + 1) % 2**64
        resumed = BatchIterator(packed_of(num_sequences), batch_size, other_seed, shuffle, repeat)
        next(resumed)  # It has an order of its own in use, which must be forgotten.
        resumed.restore(state)
        assert resumed.state() == state
        for _ in range(4):
            batch, other = next(batches, None), next(resumed, None)
            assert (batch is None) == (other is None)
            if batch is not None:
                assert_same(batch, other)

    def test_taking_a_state_changes_nothing(self):
        """Catches a state that is not a copy, or that advances the iterator."""
        batches, other = BatchIterator(packed_of(5), 2, 0), BatchIterator(packed_of(5), 2, 0)
        state = batches.state()
        assert_same(next(batches), next(other))
        assert state["position"] == 0
        assert batches.state()["position"] == 2

    def test_a_state_restores_twice(self):
        """Catches a restore that keeps and changes the caller's dictionary."""
        batches = BatchIterator(packed_of(5), 2, 0)
        next(batches)
        state = batches.state()
        first = next(batches)
        batches.restore(state)
        assert_same(next(batches), first)
        batches.restore(state)
        assert_same(next(batches), first)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"packed": packed_of(5, offset=1)}, "sequence length is '[0-9a-f]{32}' in the state"),
            ({"packed": packed_of(6)}, "the fingerprint of text, tokenizer and"),
            ({"batch_size": 3}, "batch_size is 2 in the state and 3 here"),
            ({"shuffle": False}, "shuffle is True in the state and False here"),
            ({"repeat": False}, "repeat is True in the state and False here"),
        ],
    )
    def test_a_state_of_another_run_is_refused_and_changes_nothing(self, arguments, message):
        """Catches a resume on other data, which trains on some sequences twice and others never."""
        batches = BatchIterator(packed_of(5), 2, 0)
        next(batches)
        other = BatchIterator(**({"packed": packed_of(5), "batch_size": 2, "seed": 1} | arguments))
        before = other.state()
        with pytest.raises(ValueError, match=message):
            other.restore(batches.state())
        assert other.state() == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"position": 5}, "position must lie between 0 and 4; received 5"),
            ({"position": -1}, "position must lie"),
            ({"position": 1.5}, "position must be a whole number"),
            ({"epoch": -1}, "epoch must lie"),
            ({"epoch": True}, "epoch must be a whole number"),
            ({"seed": "0"}, "seed must be a whole number"),
        ],
    )
    def test_a_damaged_state_is_refused(self, change, message):
        """Catches a state that would fail, or loop for ever, at the next batch."""
        batches = BatchIterator(packed_of(5), 2, 0)
        with pytest.raises(ValueError, match=message):
            batches.restore(batches.state() | change)

    def test_another_dictionary_is_refused(self):
        """Catches a KeyError in place of a message."""
        with pytest.raises(ValueError, match="lacks batch_size, epoch, fingerprint"):
            BatchIterator(packed_of(5), 2, 0).restore({"step": 3})


@pytest.mark.parametrize(
    ("batch_size", "seed", "message"),
    [
        (0, 0, "batch_size must be at least 1; received 0"),
        (2, -1, "seed must lie"),
        (2, 2**64, "seed must lie"),
        (2, 0.5, "seed must be a whole number"),
    ],
)
def test_arguments_out_of_range_are_refused(batch_size, seed, message):
    """Catches an endless loop for empty batches, and NumPy's error for a seed."""
    with pytest.raises(ValueError, match=message):
        BatchIterator(packed_of(5), batch_size, seed)
