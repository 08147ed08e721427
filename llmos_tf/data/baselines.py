"""Bits per byte, and the byte bigram model that a language model has to beat.

Bits per byte = the summed loss in nats / ln 2 / the UTF-8 bytes of the text. Unlike a loss per
token it compares models of different tokenizers. The numerator counts each document's tokens but
the first, and its end; the first token of a document is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

# Byte 0xFF occurs nowhere in UTF-8, as in `ByteTokenizer`.
_END = 255
_NUM_SYMBOLS = 256


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
    train: Iterable[str], heldout: Iterable[str], smoothing: float = 0.1
) -> float:
    """Returns the bits per byte of a bigram model of bytes, counted on one text, scored on another.

    With c(a, b) the number of times that byte b follows byte a in the training documents and
    s = `smoothing`, the model is p(b | a) = (c(a, b) + s) / (sum over b of c(a, b) + 256 s), where
    0xFF, which is no byte of UTF-8, stands for the end of a document. Pairs across two documents
    are neither counted nor scored. It is a model of bytes, whatever the tokenizer of the model that
    is compared with it.

    Args:
        train: the training documents.
        heldout: the held-out documents.
        smoothing: what is added to each count, more than 0.

    Returns:
        Bits per byte of the held-out documents.

    Raises:
        ValueError: if `smoothing` is out of range, or there are no held-out bytes.

    Example:
        >>> bigram_bits_per_byte(["ab" * 500], ["ab" * 5]) < 1.0
        True
    """
    if not (smoothing > 0.0 and math.isfinite(smoothing)):
        raise ValueError(
            f"smoothing must be more than 0, or an unseen pair costs infinitely many bits; "
            f"received {smoothing!r}."
        )
    pairs, _ = _count_pairs(train)
    firsts = pairs.sum(axis=1, keepdims=True)
    log_probability = np.log(pairs + smoothing) - np.log(firsts + smoothing * _NUM_SYMBOLS)
    scored, num_bytes = _count_pairs(heldout)
    return bits_per_byte(-float(np.sum(scored * log_probability)), num_bytes)


def _count_pairs(documents: Iterable[str]) -> tuple[np.ndarray, int]:
    """Returns how often each symbol follows each other in a document, and the bytes of all."""
    counts = np.zeros(_NUM_SYMBOLS**2, np.int64)
    num_bytes = 0
    for document in documents:
        symbols = np.frombuffer(document.encode("utf-8"), np.uint8).astype(np.int64)
        num_bytes += symbols.size
        symbols = np.append(symbols, _END)
        pairs = symbols[:-1] * _NUM_SYMBOLS + symbols[1:]
        if pairs.size < counts.size:
            # Of many short documents not a table for each.
            np.add.at(counts, pairs, 1)
        else:
            counts += np.bincount(pairs, minlength=counts.size)
    return counts.reshape(_NUM_SYMBOLS, _NUM_SYMBOLS), num_bytes
