"""Bits per byte, and the byte bigram model that a language model has to beat.

Bits per byte = the summed loss in nats / ln 2 / the UTF-8 bytes of the text. Unlike a loss per
token it compares models of different tokenizers. The numerator counts each document's tokens but
the first, and its end; the first token of a document is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from llmos_tf.data.packing import PackedTokens

# The counts are one square table: 128 MiB of them at this size.
_MAX_VOCAB_SIZE = 4096


def count_bytes(documents: Iterable[str | bytes]) -> int:
    """Returns the number of UTF-8 bytes of documents.

    Args:
        documents: texts, or texts already encoded.

    Returns:
        The sum of their bytes.

    Example:
        >>> count_bytes(["é!", b"abc"])
        6
    """
    return sum(len(text.encode("utf-8") if isinstance(text, str) else text) for text in documents)


def bits_per_byte(total_loss: float, num_bytes: int) -> float:
    """Returns the bits that a model spends on each byte of a text.

    Args:
        total_loss: the sum, not the mean, of the losses of all targets that count, in nats.
        num_bytes: the UTF-8 bytes of the text.

    Returns:
        Bits per byte.

    Raises:
        ValueError: if there are no bytes.

    Example:
        >>> bits_per_byte(total_loss=80 * math.log(2), num_bytes=10)
        8.0
    """
    if num_bytes < 1:
        raise ValueError(f"Bits per byte need a text of at least one byte; received {num_bytes}.")
    return float(total_loss) / math.log(2.0) / num_bytes


def bigram_bits_per_byte(
    train_tokens: PackedTokens,
    heldout_tokens: PackedTokens,
    heldout_bytes: int,
    vocab_size: int = 256,
    smoothing: float = 0.1,
) -> float:
    """Returns the bits per byte of a bigram model, counted on one text and scored on another.

    With c(a, b) the number of times that b follows a in the training documents, V = `vocab_size`
    and s = `smoothing`, the model is p(b | a) = (c(a, b) + s) / (sum over b of c(a, b) + s V).
    Pairs across two documents and the padding are neither counted nor scored: they have weight 0
    in the packed tokens, as they have for the model that is compared with this one.

    Args:
        train_tokens: the packed training documents, of byte tokens for a byte bigram model.
        heldout_tokens: the packed held-out documents, of any sequence length.
        heldout_bytes: the UTF-8 bytes of the held-out documents.
        vocab_size: the number of ids, at most 4096: the model is a table of its square.
        smoothing: what is added to each count, more than 0.

    Returns:
        Bits per byte of the held-out documents.

    Raises:
        ValueError: if `vocab_size` or `smoothing` is out of range, or a token is not below
            `vocab_size`.

    Example:
        >>> from llmos_tf.data import ByteTokenizer, pack_documents
        >>> train, heldout = (
        ...     pack_documents([ByteTokenizer().encode(text)], 64, end_of_document=255)
        ...     for text in ("ab" * 500, "ab" * 5)
        ... )
        >>> bigram_bits_per_byte(train, heldout, heldout_bytes=10) < 1.0
        True
    """
    if not 1 <= vocab_size <= _MAX_VOCAB_SIZE:
        raise ValueError(
            f"The bigram model takes a vocab_size between 1 and {_MAX_VOCAB_SIZE}; received "
            f"{vocab_size}. For a larger vocabulary pack the same documents with ByteTokenizer: "
            "bits per byte compare across tokenizers."
        )
    if not (smoothing > 0.0 and math.isfinite(smoothing)):
        raise ValueError(
            f"smoothing must be more than 0, or an unseen pair costs infinitely many bits; "
            f"received {smoothing!r}."
        )
    pairs = _pair_counts(train_tokens, vocab_size, "train_tokens")
    firsts = pairs.sum(axis=1, keepdims=True)
    log_probability = np.log(pairs + smoothing) - np.log(firsts + smoothing * vocab_size)
    scored = _pair_counts(heldout_tokens, vocab_size, "heldout_tokens")
    return bits_per_byte(-float(np.sum(scored * log_probability)), heldout_bytes)


def _pair_counts(packed: PackedTokens, vocab_size: int, name: str) -> np.ndarray:
    """Returns how often each token follows each other in a document, `[vocab, vocab]`."""
    largest = int(packed.tokens.max())
    if largest >= vocab_size:
        raise ValueError(
            f"{name} holds the token {largest}, but vocab_size is {vocab_size}. Pack with "
            "ByteTokenizer, or give the vocab_size of the tokenizer."
        )
    counted = packed.weights > 0.0
    pairs = packed.inputs[counted].astype(np.int64) * vocab_size + packed.targets[counted]
    return np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
