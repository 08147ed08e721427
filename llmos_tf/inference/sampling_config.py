"""How the next token is chosen: a frozen dataclass, without TensorFlow."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen from the logits.

    In this order: tokens from `vocab_size` on are left out, logits are divided by `temperature`,
    the `top_k` likeliest tokens stay, and of these the likeliest that together have probability
    `top_p`; one of them is drawn.

    Args:
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_k: number of likeliest tokens to draw from, None for all.
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least
            this (nucleus sampling), in (0, 1]; None for all. One token always stays.
        seed: of the draws, from 0 to 2³¹ - 1. The same seed draws the same tokens.
        vocab_size: draw from the tokens below this, None for all of the model's. For a model whose
            vocabulary is larger than its tokenizer's.

    Raises:
        ValueError: a value out of its range.

    Example:
        >>> SamplingConfig(temperature=0.7, top_k=40, seed=1).top_k
        40

    Reference:
        Fan et al., top-k (arXiv 1805.04833); Holtzman et al., nucleus (arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    vocab_size: int | None = None

    def __post_init__(self):
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(
                "`temperature` is 0, which takes the likeliest token, or a positive number such as "
                f"0.7. Received: temperature={self.temperature!r}."
            )
        if self.top_k is not None and not (_is_integer(self.top_k) and self.top_k >= 1):
            raise ValueError(
                "`top_k` is a positive number of tokens, or None for all. "
                f"Received: top_k={self.top_k!r}."
            )
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(
                "`top_p` is a probability in (0, 1], or None for all tokens. "
                f"Received: top_p={self.top_p!r}."
            )
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**31:
            raise ValueError(
                f"`seed` is an integer from 0 to {2**31 - 1}. Received: seed={self.seed!r}."
            )
        if self.vocab_size is not None and not (
            _is_integer(self.vocab_size) and self.vocab_size >= 1
        ):
            raise ValueError(
                "`vocab_size` is a positive number of tokens, or None for all. "
                f"Received: vocab_size={self.vocab_size!r}."
            )


def _is_integer(value: Any) -> bool:
    # bool is an int in Python, and True tokens are a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
