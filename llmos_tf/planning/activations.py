"""What the forward pass of a language model keeps for the backward pass, by formulas.

Symbols: b rows and s positions of a device; t, the size of the tensor axis; N query heads, K
key-value heads, H the width of one; D, F, V as everywhere. n = b·s is the number of a device's
tokens in a region, n' of those in the residual stream: n/t under sequence parallelism, else n.
c is the size of a number in the compute type, 4 or 2 bytes, and w = 4 bytes what norms, softmax and
the loss compute with.

Kept of a block, in the manner of arXiv 2205.05198 but for the layers as they are here, of which
norms, GELU and softmax keep only what their gradient is computed from again:

| what | bytes |
|---|---|
| norm: its result, from which the products' gradients are made | n'Dc |
| under sequence parallelism in place of the result: it, gathered | nDc |
| q, k, v and the heads' results | nHc(2N + 2K)/t |
| softmax of the scores, and in 16 bits a copy in 16 bits | n·s·N/t·w, + n·s·N/t·c |
| attention by blocks in their place: the results as they are summed up, by head | nHcN/t |
| residual stream after either half, which is the next norm's input | n'Dc |
| GELU: its input and its result | 2nFc/t |
| gated: both products, silu, and the product | 4nFc/t |
| gated, forward and backward in one function: x(1-σ(x)) and σ(x)², which need not wait | 2nFc/t |
| dropout: masks, and the softmax as it was | 2n'D + n·s·N/t(1 + c) |
| experts, k of them for a token, of balanced load: the same of kn rows, and the rows | + 2knDc |
"""

import math
from dataclasses import dataclass

from llmos_tf.config import GPTConfig, MixtralConfig, ModelConfig

WIDE = 4
# Positions from which on attention goes by blocks, and keeps no scores.
_BLOCKWISE = 1024
# Then queries go by so many pieces, and keys by blocks of so many at most.
_PIECES = 4
_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one device in one microbatch.

    Args:
        rows: b.
        positions: s, those that the device has of each row.
        tensor: t.
        context: ranks over which positions are split.
        context_method: "ring" or "ulysses".
        sequence_parallel: whether the residual stream is split over `tensor`.
        compute_bytes: c.
        in_parts: whether forward and backward pass are functions of their own, as in a pipeline.
    """

    rows: float
    positions: float
    tensor: int = 1
    context: int = 1
    context_method: str = "ring"
    sequence_parallel: bool = False
    compute_bytes: int = 4
    in_parts: bool = False

    @property
    def in_region(self) -> float:
        """n."""
        return self.rows * self.positions

    @property
    def in_stream(self) -> float:
        """n'."""
        return self.in_region / (self.tensor if self.sequence_parallel else 1)


def of_block(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes that a block keeps.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    masks = 2 * tokens.in_stream * config.hidden_size if config.dropout else 0
    halves = of_attention(config, tokens) + of_feed_forward(config, tokens)
    return 2 * _of_norm(config, tokens) + halves + masks


def in_gradient_of_hidden(config: ModelConfig) -> int:
    """How many tensors of the hidden layer its gradient takes while what it is made of is held.

    Of GELU the gradients of its result and of its input. Of a gate that of the product, one for
    either factor and one within silu, and both laid together.

    Args:
        config: of the model.

    Returns:
        Their number.
    """
    return 2 if isinstance(config, GPTConfig) else 6


def of_scores(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes of attention's scores as softmax computes with them: n·s·N/t·w.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes; 0 where attention goes by blocks, which are small.
    """
    if tokens.context > 1 or tokens.positions >= _BLOCKWISE:
        return 0.0
    return tokens.in_region * tokens.positions * config.num_heads / tokens.tensor * WIDE


def of_multiplied_scores(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes of the scores that are multiplied with values, where softmax's result is kept beside.

    They are gone when the softmax is differentiated.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes; 0 where softmax's result itself is multiplied.
    """
    if tokens.compute_bytes == WIDE and not config.dropout:
        return 0.0
    return of_scores(config, tokens) * tokens.compute_bytes / WIDE


def in_gradient_of_attention(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes that attention's gradient takes beside what was kept, but for some of the stream.

    Of a matrix of scores the gradient of the softmax and its product with it. By blocks, of each
    quarter of the queries the scores of the keys that it sees, before and after they are hidden,
    and the last quarter's gradient; more than a block of keys go one after the other. In a ring so
    the three products of halves, and the keys that travel.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    if of_scores(config, tokens):
        return 2 * of_scores(config, tokens)
    per_key = tokens.in_region * config.num_heads / tokens.tensor * WIDE
    if tokens.context > 1 and tokens.context_method == "ring":
        moving = 4 * of_key_value(config, tokens)
        return 1.5 * per_key * min(tokens.positions, 2 * _BLOCK) + moving
    pieces = _keys_of_pieces(tokens)
    at_once = 2 * sum(keys for keys in pieces if keys <= _BLOCK)
    return per_key / _PIECES * (at_once + min(pieces[-1], _BLOCK))


def _keys_of_pieces(tokens: Tokens) -> list[float]:
    """How many keys each quarter of the queries sees, where a rank has all positions."""
    positions = tokens.positions * tokens.context
    return [positions * (i + 1) / _PIECES for i in range(_PIECES)]


def of_stream(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes of the residual stream: n'Dc.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    return tokens.in_stream * config.hidden_size * tokens.compute_bytes


def of_hidden(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes of one activation between the products of the feed-forward half: nFc/t.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes; for experts those of all that a token is sent to.
    """
    rows = tokens.in_region
    if isinstance(config, MixtralConfig):
        rows *= config.num_experts_per_token
    return rows * config.feed_forward_size * tokens.compute_bytes / tokens.tensor


def of_head(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes that the last norm and the loss keep: D for each token, and V/t.

    Of whole logits the loss keeps its slope, of those cut by vocabulary the logits themselves; in
    either case both are there for a moment when the backward pass begins.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    return _of_norm(config, tokens) + of_logits(config, tokens)


def of_logits(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes of the logits as the loss computes with them: nVw/t.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    return tokens.in_region * -(-config.vocab_size // tokens.tensor) * WIDE


def _of_norm(config: ModelConfig, tokens: Tokens) -> float:
    """Its result, as the products have it. Its input is the residual stream."""
    result = tokens.in_region if tokens.sequence_parallel else tokens.in_stream
    return config.hidden_size * tokens.compute_bytes * result


def of_key_value(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes of the keys and values of a rank's own positions, 2nKHc/t.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes; of key-value heads that t does not divide those that the rank's queries use.
    """
    heads, t = config.num_heads, tokens.tensor
    kv_heads = getattr(config, "num_kv_heads", heads)
    mine = (
        kv_heads // t
        if kv_heads % t == 0
        else heads // t // math.gcd(heads // t, heads // kv_heads)
    )
    return 2 * tokens.in_region * mine * config.head_dim * tokens.compute_bytes


def of_query(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes of the queries, or of the heads' results: nNHc/t.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    heads = config.num_heads / tokens.tensor
    return tokens.in_region * heads * config.head_dim * tokens.compute_bytes


def of_attention(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes that attention keeps, without its norm.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    c, query = tokens.compute_bytes, of_query(config, tokens)
    kept = 2 * query + of_key_value(config, tokens) + of_stream(config, tokens)
    scores = of_scores(config, tokens)
    if not scores:
        # The results by head, in w for the gradient, and a number for each query.
        results = query / c * WIDE * (1 + 1 / config.head_dim)
        return kept + _sent_and_seen(config, tokens) + results
    # Dropout keeps its mask, in bytes, and its result, which then is what is multiplied.
    narrow = c + 1 if config.dropout else c if c != WIDE else 0
    mask = tokens.positions * tokens.positions
    return kept + scores * (1 + narrow / WIDE) + mask


def _sent_and_seen(config: ModelConfig, tokens: Tokens) -> float:
    """Of keys and values those that are sent beyond a rank's own; or of masks that are whole."""
    if tokens.context == 1:
        seen = sum(min(keys, _BLOCK) for keys in _keys_of_pieces(tokens))
        return seen * tokens.positions / _PIECES if tokens.positions <= _BLOCK else 0.0
    if tokens.context_method == "ring":
        return 0.0
    # Ulysses repeats heads of keys and values as far as each rank gets one.
    key_value = of_key_value(config, tokens)
    one = 2 * tokens.in_region * config.head_dim * tokens.compute_bytes
    heads = round(key_value / one)
    return key_value * (tokens.context // math.gcd(heads, tokens.context) - 1)


def of_feed_forward(config: ModelConfig, tokens: Tokens) -> float:
    """Bytes that the feed-forward half of a block keeps, without its norm.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    is_gated = not isinstance(config, GPTConfig)
    copies = 2 if not is_gated else 4 if tokens.in_parts else 6
    kept = copies * of_hidden(config, tokens) + of_stream(config, tokens)
    if isinstance(config, MixtralConfig):
        rows = config.num_experts_per_token * tokens.in_region
        kept += 2 * rows * config.hidden_size * tokens.compute_bytes
    return kept
