"""What the forward pass of a language model keeps for the backward pass, by formulas.

Symbols: b rows and s positions of a device; t, the size of the tensor axis; N query heads, K
key-value heads, H the width of one; D, F, V as everywhere. n = b·s is the number of a device's
tokens in a region, n' of those in the residual stream: n/t under sequence parallelism, else n.
c is the size of a number in the compute type, 4 or 2 bytes, and w = 4 bytes what norms, softmax and
the loss compute with.

Kept of a block, in the manner of arXiv 2205.05198 but for the layers as they are here:

| what | bytes |
|---|---|
| norm: x/σ·g, and its result, from which the products' gradients are made | n'D(w + c) |
| norm in 16 bits: its input in w too | n'Dw |
| under sequence parallelism in place of the result: it, gathered | nDc - n'Dc |
| q, k, v and the heads' results | nHc(2N + 2K)/t |
| softmax of the scores, and in 16 bits a copy in 16 bits | n·s·N/t·w, + n·s·N/t·c |
| residual stream after either half (in w it is the next norm's input) | n'Dc |
| GELU by tanh: its input h, h², 0.5h, 1 + tanh, the product of these, and tanh | 6nFc/t |
| gated: both products, σ(x), and the product | 4nFc/t |
| gated, forward and backward in one function: x(1-σ(x)) and σ(x)², which need not wait | 2nFc/t |
| dropout: masks, and attention's weights before it | 2n'D + n·s·N/t(1 + c) |
| experts, k of them for a token, of balanced load: the same of kn rows, and the rows | + 2knDc |
"""

from dataclasses import dataclass

from llmos_tf.config import GPTConfig, MixtralConfig, ModelConfig

WIDE = 4
# Positions from which on attention goes by blocks, and keeps no scores.
_BLOCKWISE = 1024


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
    halves = _of_attention(config, tokens) + _of_feed_forward(config, tokens)
    return 2 * _of_norm(config, tokens) + halves + masks


def while_recomputed(config: ModelConfig, tokens: Tokens) -> tuple[float, float]:
    """Bytes while a block that was not kept is computed again and differentiated.

    What it has computed is held until it is through: of the hidden layer eight tensors for GELU and
    six for a gate, of the stream 12 and 14. To them come those of the gradient, in either half.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes while its feed-forward half is differentiated, and while its attention is.
    """
    is_gpt = isinstance(config, GPTConfig)
    hidden, stream = of_hidden(config, tokens), of_stream(config, tokens)
    heads = tokens.in_region * tokens.positions * config.num_heads / tokens.tensor
    scores = heads * WIDE if tokens.positions < _BLOCKWISE else 0
    held = (8 if is_gpt else 6) * hidden + scores
    streams = 12 if is_gpt else 14
    in_feed_forward = held + (5 if is_gpt else 6) * hidden + streams * stream
    return in_feed_forward, held + 3 * scores + (streams + 2) * stream


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
    """Bytes that the last norm, the logits and the loss keep, when the backward pass begins.

    On one rank the gradient of the logits is written over them: nVw, and in 16 bits they are there
    too. Cut by vocabulary: logits, their distance to the largest, its exponential and the one-hot
    labels; of which a pipeline's forward pass hands on the exponential alone.

    Args:
        config: of the model.
        tokens: of the device.

    Returns:
        Bytes.
    """
    logits = of_logits(config, tokens) / WIDE
    narrow = 0 if tokens.compute_bytes == WIDE or tokens.tensor > 1 else tokens.compute_bytes
    copies = 4 * WIDE if tokens.tensor > 1 and not tokens.in_parts else WIDE
    return _of_norm(config, tokens) + logits * (copies + narrow)


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
    width, c = config.hidden_size, tokens.compute_bytes
    result = tokens.in_region if tokens.sequence_parallel else tokens.in_stream
    # The input: the residual stream, or a wide copy of it.
    wide = 0 if c == WIDE else WIDE * tokens.in_stream
    if isinstance(config, GPTConfig):
        return width * (WIDE * tokens.in_stream + c * result + wide)
    return width * (c * tokens.in_stream + c * result + wide)


def _of_attention(config: ModelConfig, tokens: Tokens) -> float:
    n, c, t = tokens.in_region, tokens.compute_bytes, tokens.tensor
    heads = config.num_heads / t
    kv = getattr(config, "num_kv_heads", config.num_heads)
    kv_heads = kv / t if kv % t == 0 else heads
    query, key_value = n * heads * config.head_dim * c, 2 * n * kv_heads * config.head_dim * c
    kept = 2 * query + key_value + _residual(config, tokens)
    if tokens.context > 1:
        if tokens.context_method == "ring":
            # The others' keys and values, which come again for the backward pass, before it begins.
            # Queries in halves, results, and the sums that attention begins with.
            return kept + (tokens.context + 1) * key_value + 4 * query
        # Keys and values of all positions and some heads, and the sums.
        return kept + query
    if tokens.positions >= _BLOCKWISE:
        return kept + 2 * query
    narrow = 0 if c == WIDE else c
    # Dropout keeps its mask, in bytes, and the weights as they were.
    dropped = c + 1 if config.dropout else 0
    mask = tokens.positions * tokens.positions
    return kept + n * tokens.positions * heads * (WIDE + narrow + dropped) + mask


def _of_feed_forward(config: ModelConfig, tokens: Tokens) -> float:
    is_gated = not isinstance(config, GPTConfig)
    copies = 4 if is_gated and tokens.in_parts else 6
    kept = copies * of_hidden(config, tokens) + _residual(config, tokens)
    if isinstance(config, MixtralConfig):
        rows = config.num_experts_per_token * tokens.in_region
        kept += 2 * rows * config.hidden_size * tokens.compute_bytes
    return kept


def _residual(config: ModelConfig, tokens: Tokens) -> float:
    return of_stream(config, tokens) if tokens.compute_bytes == WIDE else 0
