"""From the name of a corpus to packed tokens, in one call."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llmos_tf.data.baselines import bigram_bits_per_byte, count_bytes
from llmos_tf.data.corpora import load_corpus
from llmos_tf.data.packing import PackedTokens, pack_documents
from llmos_tf.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class TextData:
    """A corpus ready to train and evaluate on.

    Attributes:
        train: the packed training documents.
        heldout: the packed held-out documents.
        heldout_bytes: the UTF-8 bytes of the held-out documents, what bits per byte divide by.
        bigram_bits_per_byte: of a bigram model of bytes, which a model has to beat on the held-out
            documents.
        tokenizer: what turned text into the tokens, and turns tokens into text.
        corpus_name: where the documents come from, for reports.

    Example:
        ```python
        data = load_text_data("stdlib", tokenizer=None, sequence_length=256)
        baseline = data.bigram_bits_per_byte
        ```
    """

    train: PackedTokens
    heldout: PackedTokens
    heldout_bytes: int
    bigram_bits_per_byte: float
    tokenizer: Tokenizer
    corpus_name: str


def load_text_data(
    data: str,
    tokenizer: Tokenizer | str | os.PathLike[str] | None,
    sequence_length: int,
    heldout_fraction: float = 0.05,
) -> TextData:
    """Reads a corpus, tokenizes it and packs both of its parts.

    The errors are those of `load_corpus`, `load_tokenizer` and `pack_documents`.

    Args:
        data: what `load_corpus` takes: `"stdlib"`, a path, or a glob pattern.
        tokenizer: a tokenizer, or what `load_tokenizer` takes: a path, or None for bytes.
        sequence_length: the number of inputs of a sequence.
        heldout_fraction: the share to hold out, between 0 and 1.

    Returns:
        The packed corpus.

    Example:
        ```python
        data = load_text_data("texts/*.txt", tokenizer=None, sequence_length=256)
        batches = BatchIterator(data.train, batch_size=8, seed=0)
        ```
    """
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        # Before the corpus: a wrong path is said at once, not after megabytes were read.
        tokenizer = load_tokenizer(tokenizer)
    corpus = load_corpus(data, heldout_fraction)
    train, heldout = (
        pack_documents(
            (tokenizer.encode(document) for document in documents),
            sequence_length,
            tokenizer.end_of_document,
        )
        for documents in (corpus.train, corpus.heldout)
    )
    return TextData(
        train=train,
        heldout=heldout,
        heldout_bytes=count_bytes(corpus.heldout),
        bigram_bits_per_byte=bigram_bits_per_byte(corpus.train, corpus.heldout),
        tokenizer=tokenizer,
        corpus_name=corpus.name,
    )
