"""Packing: documents of any length into sequences of one length, with nothing lost.

Legend of shape suffixes: N sequences, S positions of a sequence.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_MAX_TOKEN = np.iinfo(np.int32).max


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """Documents end to end, seen as N sequences of S inputs and S targets.

    The stream is stored once. Sequence `n` reads the S + 1 tokens from `n * S` on, the last of
    which is also the first of sequence `n + 1`, so `inputs` and `targets` are views of the stream
    and cost no memory. The arrays are read-only.

    Attributes:
        tokens: the stream, int32 `[N * S + 1]`, padded at its end.
        weights: 1 where a target counts towards the loss and 0 elsewhere, float32 `[N, S]`.

    Raises:
        ValueError: if the arrays do not have these shapes and types.

    Example:
        >>> packed = pack_documents([[1, 2, 3], [4, 5]], sequence_length=4, end_of_document=0)
        >>> packed.inputs.tolist()
        [[1, 2, 3, 0], [4, 5, 0, 0]]
        >>> packed.targets.tolist()
        [[2, 3, 0, 4], [5, 0, 0, 0]]
        >>> packed.weights.tolist()
        [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    """

    tokens: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        if (
            self.weights.ndim != 2
            or self.weights.size == 0
            or self.tokens.shape != (self.weights.size + 1,)
            or self.tokens.dtype != np.int32
            or self.weights.dtype != np.float32
        ):
            raise ValueError(
                "PackedTokens takes int32 tokens [N * S + 1] and float32 weights [N, S], N and S "
                f"at least 1; received {self.tokens.dtype} {list(self.tokens.shape)} and "
                f"{self.weights.dtype} {list(self.weights.shape)}."
            )
        for name in ("tokens", "weights"):
            # A view: the caller's own array stays as writable as it was.
            view = getattr(self, name).view()
            view.flags.writeable = False
            object.__setattr__(self, name, view)

    @property
    def num_sequences(self) -> int:
        """The number of sequences, N."""
        return self.weights.shape[0]

    @property
    def sequence_length(self) -> int:
        """The number of positions of a sequence, S."""
        return self.weights.shape[1]

    @property
    def num_targets(self) -> int:
        """The number of targets that count towards the loss."""
        return int(np.count_nonzero(self.weights))

    @property
    def inputs(self) -> np.ndarray:
        """What the model reads, int32 `[N, S]`, a view of the stream."""
        return self.tokens[:-1].reshape(self.weights.shape)

    @property
    def targets(self) -> np.ndarray:
        """What the model predicts at each position, int32 `[N, S]`, a view of the stream."""
        return self.tokens[1:].reshape(self.weights.shape)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the content, 32 hexadecimal digits, the same on every machine."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{self.num_sequences} {self.sequence_length}".encode())
        # Little-endian whatever the machine.
        digest.update(np.ascontiguousarray(self.tokens, "<i4").data)
        digest.update(np.ascontiguousarray(self.weights, "<f4").data)
        return digest.hexdigest()


def pack_documents(
    docs_tokens: Iterable[Sequence[int] | np.ndarray], sequence_length: int, end_of_document: int
) -> PackedTokens:
    """Lays documents end to end and cuts them into sequences of one length.

    Each document becomes its tokens followed by `end_of_document`. Windows of
    `sequence_length + 1` tokens overlap by one, so every token but the very first is a target
    exactly once. Two kinds of target have weight 0: the first token of a document, which nothing
    in that document precedes, and the padding after the last document. The padding is made of
    `end_of_document`.

    Args:
        docs_tokens: the token ids of each document, in order. An empty document becomes a lone
            `end_of_document`, which as a first token is not predicted.
        sequence_length: the number of inputs of a sequence.
        end_of_document: the id that ends each document.

    Returns:
        The packed documents.

    Raises:
        ValueError: if `sequence_length` is less than 1, a token is not an id (an integer of 31
            bits), or no document has any token.

    Example:
        >>> pack_documents([[7, 8]], sequence_length=2, end_of_document=0).targets.tolist()
        [[8, 0]]
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1; received {sequence_length}.")
    end = _as_ids([end_of_document], "end_of_document")
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    for index, document in enumerate(docs_tokens):
        ids = _as_ids(document, f"document {index}")
        pieces += [ids, end]
        lengths.append(ids.size + 1)
    length = sum(lengths)
    if length == len(lengths):
        raise ValueError(
            f"There is nothing to pack: {len(lengths)} documents without a single token. Give at "
            "least one document with a token in it."
        )
    num_sequences = -(-(length - 1) // sequence_length)
    tokens = np.full(num_sequences * sequence_length + 1, end[0], np.int32)
    np.concatenate(pieces, out=tokens[:length])
    weights_by_token = np.zeros(tokens.size, np.float32)
    weights_by_token[:length] = 1.0
    weights_by_token[np.cumsum([0, *lengths[:-1]])] = 0.0
    # A target is one token further than its input: the stream's first token is no target.
    weights_NS = weights_by_token[1:].reshape(num_sequences, sequence_length)
    return PackedTokens(tokens=tokens, weights=weights_NS)


def _as_ids(values: Sequence[int] | np.ndarray, what: str) -> np.ndarray:
    """Returns one-dimensional values as int32, or says why they are not token ids."""
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)  # NumPy makes a list of nothing a float array.
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"Token ids must be one row of integers; received for {what} an array of "
            f"{array.dtype} with shape {list(array.shape)}."
        )
    if array.min() < 0 or array.max() > _MAX_TOKEN:
        raise ValueError(
            f"Token ids must lie between 0 and {_MAX_TOKEN}; received for {what} ids from "
            f"{array.min()} to {array.max()}."
        )
    return array.astype(np.int32, copy=False)
