"""What blocks that are computed again keep, and take while they are, by formulas.

Symbols are those of `llmos_tf.planning.activations`. Kept of a block:

| `rematerialise` | bytes |
|---|---|
| "none" | `activations.of_block` |
| "block", "full": its input | n'Dc |
| "selective": its input, q, k, v, the heads' results, what attention adds to the stream, and the first products of the feed-forward half | n'Dc + nHc(2N + 2K)/t + n'Dc + nFc/t, gated 2nFc/t |
| attention by blocks: a number for each query; Ulysses: the heads' results once more | + nNw/t; + nNHc/t |
| experts, k of them for a token: the same of kn rows, the last products, and their weights | + knDc + nEc |
"""  # noqa: E501

from llmos_tf.config import GPTConfig, MixtralConfig, ModelConfig
from llmos_tf.planning.activations import (
    WIDE,
    Tokens,
    in_gradient_of_attention,
    of_attention,
    of_block,
    of_hidden,
    of_key_value,
    of_multiplied_scores,
    of_query,
    of_scores,
    of_stream,
)


def kept_of_block(config: ModelConfig, tokens: Tokens, rematerialise: str) -> float:
    """Bytes that a block keeps for its backward pass.

    Args:
        config: of the model.
        tokens: of the device.
        rematerialise: as for `MeshStrategy`.

    Returns:
        Bytes.
    """
    if rematerialise == "none":
        return of_block(config, tokens)
    stream = of_stream(config, tokens)
    if rematerialise != "selective":
        return stream
    first_products = 1 if isinstance(config, GPTConfig) else 2
    kept = 2 * stream + 2 * of_query(config, tokens) + of_key_value(config, tokens)
    kept += first_products * of_hidden(config, tokens)
    if not of_scores(config, tokens):
        # A number for each query, from which blocks of scores are computed again.
        kept += tokens.in_region * config.num_heads / tokens.tensor * WIDE
    if tokens.context > 1 and tokens.context_method == "ulysses":
        # The heads' results before they are sent back, too.
        kept += of_query(config, tokens)
    if isinstance(config, MixtralConfig):
        rows = config.num_experts_per_token * tokens.in_region
        kept += rows * config.hidden_size * tokens.compute_bytes
        kept += tokens.in_region * config.num_experts * tokens.compute_bytes
    return kept


def while_recomputed(
    config: ModelConfig, tokens: Tokens, rematerialise: str
) -> tuple[float, float]:
    """Bytes beside what was kept, while a block is computed again and differentiated.

    Args:
        config: of the model.
        tokens: of the device.
        rematerialise: as for `MeshStrategy`, but for "none".

    Returns:
        Bytes while its feed-forward half is differentiated, and while its attention is.
    """
    if rematerialise == "selective":
        return _beside_products(config, tokens)
    return _beside_input(config, tokens)


def _beside_products(config: ModelConfig, tokens: Tokens) -> tuple[float, float]:
    """Where products were kept. The call holds these until it is through.

    Of the stream's width two norms, the sum after attention and the gradient; then one norm and two
    gradients. Where positions are split, norms and the gradient are gathered. Attention's result in
    order, the queries, and keys and values by head; or halves of what is rotated. Of GELU its
    input, its result and their gradients; of a gate seven tensors.
    """
    stream, hidden = of_stream(config, tokens), of_hidden(config, tokens)
    query, key = of_query(config, tokens), of_key_value(config, tokens) / 2
    scores, is_gpt = of_scores(config, tokens), isinstance(config, GPTConfig)
    region = tokens.in_region * config.hidden_size * tokens.compute_bytes
    if isinstance(config, MixtralConfig):
        # The rows of experts and their gradient; by then the scores are there.
        rows = config.num_experts_per_token * tokens.in_region * config.hidden_size
        in_feed_forward = 2 * (query + key) + 6 * hidden + scores + 2 * rows * tokens.compute_bytes
    else:
        in_feed_forward = (2 if is_gpt else 3) * (query + key) + (4 if is_gpt else 7) * hidden
    if tokens.sequence_parallel:
        # What waits for others comes later.
        in_feed_forward += 2 * stream + 3 * region - hidden + (scores if is_gpt else 0)
    else:
        in_feed_forward += 4 * stream
    in_attention = scores + in_gradient_of_attention(config, tokens)
    if config.dropout:
        # The softmax's result, what is left of it, and its mask, and for a moment both scaled; and
        # of the stream as much.
        left = of_multiplied_scores(config, tokens)
        in_feed_forward += scores + left + scores / WIDE + 1.5 * stream
        in_feed_forward += max(left - 2 * hidden, -hidden)
    return in_feed_forward, 3 * stream + query + (3 if is_gpt else 2) * key + in_attention


def _beside_input(config: ModelConfig, tokens: Tokens) -> tuple[float, float]:
    """Where nothing else was kept: what the block has computed is held until it is through.

    Of the stream's width two norms, what attention gives and the gradient; over a tensor axis also
    both partial sums, and where positions are split the norms, gathered. Of a query's width q, q
    divided, and attention's result in order; the keys and the values; of rotated ones also their
    halves. The scores before and after the softmax; of GELU two tensors, of a gate four.
    """
    hidden, stream = of_hidden(config, tokens), of_stream(config, tokens)
    scores, is_gpt = of_scores(config, tokens), isinstance(config, GPTConfig)
    region = tokens.in_region * config.hidden_size * tokens.compute_bytes
    query, key = of_query(config, tokens), of_key_value(config, tokens) / 2
    held = 3 * query + 2 * key + (0 if is_gpt else query + key)
    held += 4 * stream + (2 * region if tokens.tensor > 1 else 0)
    held += 2 * region if tokens.sequence_parallel else 0
    held += 2 * scores + of_multiplied_scores(config, tokens)
    if config.dropout:
        # A mask, and the gradient of what is left; results of the stream's width and their masks.
        held += scores / WIDE + of_multiplied_scores(config, tokens) + 1.75 * stream
    if not scores:
        held += of_attention(config, tokens) - 2 * query - 2 * key - stream
    in_feed_forward = 4 * hidden + stream if is_gpt else 12 * hidden
    # The softmax's gradient, with that of the values; or those of q, k and v, also laid together;
    # or where positions are split the gradient of what was gathered, cut, and in a row.
    in_attention = max(
        in_gradient_of_attention(config, tokens) + (2 if is_gpt else 1) * key,
        2 * query + 4 * key if is_gpt else 0.0,
        3 * region - 2 * key if tokens.sequence_parallel else 0.0,
    )
    return held + in_feed_forward, held + (2 if is_gpt else 4) * hidden + stream + in_attention
