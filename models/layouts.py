"""How the models' variables lie over tensor and expert axes: tables from path to axes.

Models know nothing of devices; everything that these axes need to know of them is here. Column then
row: the first product of a pair is cut along its outputs, the second along its inputs.
"""

from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig
from llmos_tf.sharding import Layout

# A vocabulary is cut by rows even where the axis does not divide it (GPT-2's 50,257).
_VOCABULARY = Layout(("tensor", None), uneven=True)


def gpt_layouts(config: GPTConfig) -> dict[str, tuple[str | None, ...] | Layout]:
    """Returns the layouts of a `GPT`.

    Args:
        config: its sizes.

    Returns:
        Path pattern to axes.
    """
    del config
    attention, feed_forward = r".*/block_\d+/attention", r".*/block_\d+/feed_forward"
    return {
        # [vocabulary, hidden]
        r".*/token_embedding/table": _VOCABULARY,
        # [hidden, 3, heads, head_dim], [3, heads, head_dim]
        f"{attention}/query_key_value/kernel": (None, None, "tensor", None),
        f"{attention}/query_key_value/bias": (None, "tensor", None),
        # [heads, head_dim, hidden]
        f"{attention}/output/kernel": ("tensor", None, None),
        # [hidden, feed_forward], [feed_forward]
        f"{feed_forward}/up/kernel": (None, "tensor"),
        f"{feed_forward}/up/bias": ("tensor",),
        # [feed_forward, hidden]
        f"{feed_forward}/down/kernel": ("tensor", None),
    }


def llama_layouts(
    config: LlamaConfig, tensor_size: int
) -> dict[str, tuple[str | None, ...] | Layout]:
    """Returns the layouts of a `Llama`.

    Args:
        config: its sizes.
        tensor_size: size of the tensor axis. Where it does not divide the key-value heads, their
            product is whole on every rank.

    Returns:
        Path pattern to axes.
    """
    feed_forward = r".*/block_\d+/feed_forward"
    return {
        **_llama_layouts_but_feed_forward(config, tensor_size),
        # [hidden, 2, feed_forward]
        f"{feed_forward}/up/kernel": (None, None, "tensor"),
        # [feed_forward, hidden]
        f"{feed_forward}/down/kernel": ("tensor", None),
    }


def mixtral_layouts(
    config: MixtralConfig, tensor_size: int
) -> dict[str, tuple[str | None, ...] | Layout]:
    """Returns the layouts of a `Mixtral`. Its routers are whole on every rank.

    Args:
        config: its sizes.
        tensor_size: as for `llama_layouts`.

    Returns:
        Path pattern to axes.
    """
    experts = r".*/block_\d+/mixture/experts"
    return {
        **_llama_layouts_but_feed_forward(config, tensor_size),
        # [experts, hidden, 2, feed_forward]
        f"{experts}/up": ("expert", None, None, "tensor"),
        # [experts, feed_forward, hidden]
        f"{experts}/down": ("expert", "tensor", None),
    }


def _llama_layouts_but_feed_forward(
    config: LlamaConfig | MixtralConfig, tensor_size: int
) -> dict[str, tuple[str | None, ...] | Layout]:
    attention = r".*/block_\d+/attention"
    table: dict[str, tuple[str | None, ...] | Layout] = {
        # [vocabulary, hidden]
        r".*/token_embedding/table": _VOCABULARY,
        # [heads, head_dim, hidden]
        f"{attention}/output/kernel": ("tensor", None, None),
    }
    if not config.tie_embeddings:
        # [vocabulary, hidden]
        table[r".*/output_embedding/table"] = _VOCABULARY
    if config.num_kv_heads == config.num_heads:
        # [hidden, 3, heads, head_dim]
        table[f"{attention}/query_key_value/kernel"] = (None, None, "tensor", None)
        return table
    # [hidden, heads, head_dim]
    table[f"{attention}/query/kernel"] = (None, "tensor", None)
    if config.num_kv_heads % tensor_size == 0:
        # [hidden, 2, kv_heads, head_dim]
        table[f"{attention}/key_value/kernel"] = (None, None, "tensor", None)
    return table
