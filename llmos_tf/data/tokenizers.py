"""Tokenizers: text to token ids and back.

Two of them: bytes, which need no file and lose nothing, and any tokenizer that Hugging Face's
`tokenizers` package reads from a `tokenizer.json`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers as hf_tokenizers

from llmos_tf.files.reading import read_bytes

# The names under which public tokenizers mark the end of a document, in the order of trial:
# GPT-2 and its kin, LLaMA 1 and 2, Llama 3, BERT, Gemma.
_END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]", "<eos>")
# The largest public ones have some 40 MB.
_MAX_BYTES = 2**28
_MAX_ID = np.iinfo(np.int32).max
_HINT = "Give the path of a Hugging Face tokenizer.json, or no tokenizer to read text as bytes."


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of rows that an embedding table needs: every id lies below it."""

    @property
    def end_of_document(self) -> int:
        """The id that ends each document."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the token ids of a text, without special tokens.

        Args:
            text: the text.

        Returns:
            Token ids, int32 `[tokens]`.
        """

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of token ids, without special tokens.

        Args:
            tokens: the ids, `[tokens]`.

        Returns:
            The text.
        """

    def num_bytes(self, text: str) -> int:
        """Returns the number of UTF-8 bytes of a text, what bits per byte divide by.

        Args:
            text: the text.

        Returns:
            The number of bytes.
        """


class ByteTokenizer:
    """One token for each UTF-8 byte of the text.

    Byte 0xFF occurs nowhere in UTF-8, so its id, 255, is free to end documents.

    Example:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("é!").tolist()
        [195, 169, 33]
        >>> tokenizer.decode([195, 169, 33, 255])
        'é!'
    """

    @property
    def vocab_size(self) -> int:
        """The number of ids: 256."""
        return 256

    @property
    def end_of_document(self) -> int:
        """The id that ends each document: 255."""
        return 255

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of a text.

        Args:
            text: the text.

        Returns:
            Token ids, int32 `[bytes]`.
        """
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of bytes.

        Args:
            tokens: ids, `[tokens]`; 255 is dropped, wherever it stands.

        Returns:
            The text, with U+FFFD in place of bytes that are not UTF-8.

        Raises:
            ValueError: if an id is not a byte.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        wrong = ids[(ids < 0) | (ids > 255)]
        if wrong.size:
            raise ValueError(
                f"Token {wrong.flat[0]} is not a byte: ids lie between 0 and 255. A model whose "
                "vocabulary is larger than its tokenizer's must not sample the ids above it."
            )
        return (
            ids[ids != self.end_of_document].astype(np.uint8).tobytes().decode("utf-8", "replace")
        )

    def num_bytes(self, text: str) -> int:
        """Returns the number of UTF-8 bytes of a text.

        Args:
            text: the text.

        Returns:
            The number of bytes.
        """
        return len(text.encode("utf-8"))


class FileTokenizer:
    """A tokenizer from a Hugging Face `tokenizer.json`.

    Truncation and padding that the file may ask for are switched off: a document keeps all of its
    tokens and gets no others.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a tokenizer, or has no token that ends a document.

    Example:
        ```python
        tokenizer = FileTokenizer("gpt2/tokenizer.json")
        tokenizer.decode(tokenizer.encode("Hello"))  # "Hello"
        ```
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"There is no tokenizer file {self._path!r}. {_HINT}")
        self._tokenizer = _read_tokenizer(self._path)
        with self._naming_the_file():
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # The largest id and not the number of entries: the ids of some files have gaps.
        self._vocab_size = max(vocabulary.values(), default=-1) + 1
        if self._vocab_size > _MAX_ID:
            raise ValueError(
                f"The ids of a tokenizer must be less than {_MAX_ID:,}. Received: "
                f"{self._vocab_size - 1:,} in {self._path!r}."
            )
        present = [name for name in _END_OF_DOCUMENT_NAMES if name in vocabulary]
        if not present:
            raise ValueError(
                f"The tokenizer {self._path!r} ({len(vocabulary)} tokens) has no token that "
                f"ends a document: none of {', '.join(_END_OF_DOCUMENT_NAMES)}. Add one of them "
                "to its added_tokens."
            )
        self._end_of_document = vocabulary[present[0]]

    @property
    def vocab_size(self) -> int:
        """The number of rows that an embedding table needs: the largest id and one."""
        return self._vocab_size

    @property
    def end_of_document(self) -> int:
        """The id of the token that ends each document."""
        return self._end_of_document

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of a text, with no special token added before or after.

        Args:
            text: the text. A special token's name inside it becomes that token.

        Returns:
            Token ids, int32 `[tokens]`.

        Raises:
            ValueError: if the file's rules cannot be applied to the text.
        """  # noqa: DOC502
        with self._naming_the_file():
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoded.ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens.

        Args:
            tokens: ids, `[tokens]`; special tokens are dropped.

        Returns:
            The text.

        Raises:
            ValueError: if the file's rules cannot be applied to the tokens.
        """  # noqa: DOC502
        ids = np.asarray(tokens, np.int64)
        with self._naming_the_file():
            # The file need not mark the token as special; the package drops only those.
            return self._tokenizer.decode(ids[ids != self._end_of_document].tolist())

    def num_bytes(self, text: str) -> int:
        """Returns the number of UTF-8 bytes of a text, however it is cut into tokens.

        Args:
            text: the text.

        Returns:
            The number of bytes.
        """
        return len(text.encode("utf-8"))

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Errors of the package name the file, whose content may be damaged."""
        try:
            yield
        except BaseException as error:
            if not _is_of_the_package(error):
                raise
            raise ValueError(
                f"The tokenizer {self._path!r} cannot process this: {error}."
            ) from error


def load_tokenizer(path: str | os.PathLike[str] | None) -> Tokenizer:
    """Returns the tokenizer in a file, or the byte tokenizer if no file is given.

    The errors are those of `FileTokenizer`.

    Args:
        path: a Hugging Face `tokenizer.json`, or None for bytes.

    Returns:
        The tokenizer.

    Example:
        >>> load_tokenizer(None).vocab_size
        256
    """
    return ByteTokenizer() if path is None else FileTokenizer(path)


def _read_tokenizer(path: str) -> hf_tokenizers.Tokenizer:
    """Returns the parsed file; its errors name the file, which the package's do not."""
    try:
        return hf_tokenizers.Tokenizer.from_buffer(read_bytes(path, _MAX_BYTES))
    except OSError:
        raise
    except BaseException as error:
        if not _is_of_the_package(error):
            raise
        raise ValueError(f"{path!r} is not a tokenizer file ({error}). {_HINT}") from error


def _is_of_the_package(error: BaseException) -> bool:
    """Whether an error is about the content of the file."""
    # A failed check in the package's Rust code is a BaseException, of a class that has no module.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
