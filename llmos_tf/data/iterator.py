"""Batches of static shape in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from llmos_tf.data.packing import PackedTokens

# x int32 [B, S], y int32 [B, S], weights float32 [B, S].
Batch: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]

_MAX_SEED = 2**64 - 1
# What a hash is of, for messages.
_NAMES = {"fingerprint": "the fingerprint of text, tokenizer and sequence length"}


class BatchIterator(Iterator[Batch]):
    """Hands out packed sequences in batches, and can be stopped and resumed exactly.

    The order of an epoch is derived from the seed and the epoch's number, by sorting the raw
    64-bit output of NumPy's Philox generator, which NumPy keeps the same in all versions. No
    generator state needs saving, and a resumed run reads what the first would have read.

    With `repeat` a batch may run across the end of an epoch, so that none is short; a batch may be
    larger than the corpus. Without it the iterator ends after one epoch, and its last batch is
    filled up with rows of zeros of weight 0, so that every batch has the same shape.

    Args:
        packed: the sequences.
        batch_size: the number of sequences of a batch, over all devices.
        seed: of the order, between 0 and 2**64 - 1.
        shuffle: whether each epoch has an order of its own; else the order is that of `packed`.
        repeat: whether another epoch follows each epoch; for evaluation, False.

    Raises:
        ValueError: if `batch_size` or `seed` is out of range.

    Example:
        >>> from llmos_tf.data import pack_documents
        >>> packed = pack_documents([range(1, 9)], sequence_length=2, end_of_document=0)
        >>> batches = BatchIterator(packed, batch_size=3, seed=0, shuffle=False, repeat=False)
        >>> [x.tolist() for x, y, weights in batches]
        [[[1, 2], [3, 4], [5, 6]], [[7, 8], [0, 0], [0, 0]]]
    """

    def __init__(
        self,
        packed: PackedTokens,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        repeat: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; received {batch_size}.")
        _check_range("seed", seed, 0, _MAX_SEED)
        self._packed = packed
        self._batch_size = int(batch_size)
        self._seed = int(seed)
        self._shuffle = bool(shuffle)
        self._repeat = bool(repeat)
        self._epoch = 0
        self._position = 0
        self._order: np.ndarray | None = None

    def __next__(self) -> Batch:
        rows = self._next_rows()
        x = self._packed.inputs[rows]
        y = self._packed.targets[rows]
        weights = self._packed.weights[rows]
        missing = self._batch_size - rows.size
        if missing:
            padding = ((0, missing), (0, 0))
            x, y, weights = (np.pad(array, padding) for array in (x, y, weights))
        return x, y, weights

    def state(self) -> dict[str, Any]:
        """Returns where the iterator stands, to store beside a checkpoint.

        It counts the batches that were handed out: with a prefetching reader in between, take it
        when the batch is handed out and keep it with that batch.

        Returns:
            A dictionary that JSON can store: `epoch`, `position` (sequences of the epoch handed
            out), `seed`, and what the state belongs to: `batch_size`, `shuffle`, `repeat` and
            `fingerprint` of the packed data.

        Example:
            ```python
            resumed = BatchIterator(packed, batch_size=8, seed=0)
            resumed.restore(json.loads(json.dumps(batches.state())))
            ```
        """
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed} | (
            self._identity()
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken; the seed becomes the state's.

        A state that is refused changes nothing.

        Args:
            state: what `state` returned, in this run or another.

        Raises:
            ValueError: if the state belongs to other data, another batch size or another way of
                reading them, or is not a state.
        """
        identity = self._identity()
        if missing := sorted({"epoch", "position", "seed", *identity} - set(state)):
            raise ValueError(
                f"This is not a state of a BatchIterator: it lacks {', '.join(missing)}; received "
                f"the keys {sorted(map(str, state))}."
            )
        differences = [
            f"{_NAMES.get(key, key)} is {state[key]!r} in the state and {value!r} here"
            for key, value in identity.items()
            if state[key] != value
        ]
        if differences:
            raise ValueError(
                f"The state belongs to another run: {'; '.join(differences)}. Resume with the "
                "same data, tokenizer, sequence length and batch size, or start the data from its "
                "beginning with a new iterator."
            )
        _check_range("epoch", state["epoch"], 0, _MAX_SEED)
        _check_range("position", state["position"], 0, self._packed.num_sequences - 1)
        _check_range("seed", state["seed"], 0, _MAX_SEED)
        self._epoch, self._position, self._seed = state["epoch"], state["position"], state["seed"]
        self._order = None

    def _identity(self) -> dict[str, Any]:
        """Returns what must be the same for a state to mean the same batches."""
        return {
            "batch_size": self._batch_size,
            "shuffle": self._shuffle,
            "repeat": self._repeat,
            "fingerprint": self._packed.fingerprint,
        }

    def _next_rows(self) -> np.ndarray:
        """Returns the next sequences' indices, fewer than a batch only at the end of a pass."""
        if self._epoch and not self._repeat:
            raise StopIteration
        pieces = []
        needed = self._batch_size
        while needed:
            if self._order is None:
                self._order = self._epoch_order()
            piece = self._order[self._position : self._position + needed]
            pieces.append(piece)
            needed -= piece.size
            self._position += piece.size
            if self._position == self._packed.num_sequences:
                self._epoch, self._position, self._order = self._epoch + 1, 0, None
                if not self._repeat:
                    break
        return np.concatenate(pieces)

    def _epoch_order(self) -> np.ndarray:
        """Returns the order of the current epoch, `[N]`."""
        num_sequences = self._packed.num_sequences
        if not self._shuffle:
            return np.arange(num_sequences)
        # Raw output and not Generator.permutation, whose result NumPy may change in any release.
        key = np.array([self._seed, self._epoch], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(num_sequences), kind="stable")


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    """Raises an error unless the value is a whole number of the range."""
    # A bool is an int to Python, but a state or a seed that holds one is a mistake.
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a whole number; received {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}; received {value}.")
