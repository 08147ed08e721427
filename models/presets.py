"""Named configurations, each with its source. No TensorFlow.

Sizes that were published are kept even where a mesh axis does not divide them (GPT-2's 50,257
tokens); the small presets have heads, widths and vocabularies that 2, 4 and 8 divide.
"""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig, ModelConfig

__all__ = ["PRESETS", "get_preset"]


def _gpt2(hidden_size: int, num_heads: int, num_layers: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=50257,
        max_positions=1024,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_layers=num_layers,
        dropout=0.1,
    )


def _llama3(
    hidden_size: int, num_heads: int, num_layers: int, feed_forward_size: int
) -> LlamaConfig:
    # 8,192 positions is the length of pre-training. Later releases stretch it to 131,072 with
    # scaled rotary wavelengths, which are not part of this architecture.
    return LlamaConfig(
        vocab_size=128256,
        max_positions=8192,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=8,
        num_layers=num_layers,
        feed_forward_size=feed_forward_size,
        rope_theta=500000.0,
    )


PRESETS: Mapping[str, ModelConfig] = MappingProxyType(
    {
        # For laptops: bytes as tokens, 842,496 parameters. Ours.
        "gpt_tiny": GPTConfig(
            vocab_size=256, max_positions=128, hidden_size=128, num_heads=8, num_layers=4
        ),
        # The benchmark's model, 5,289,472 parameters. Ours.
        "gpt_mini": GPTConfig(
            vocab_size=8192, max_positions=128, hidden_size=256, num_heads=8, num_layers=4
        ),
        # Radford et al. 2019, table 2; the hyper-parameters of the released checkpoints.
        "gpt2_small": _gpt2(768, 12, 12),
        "gpt2_medium": _gpt2(1024, 16, 24),
        "gpt2_large": _gpt2(1280, 20, 36),
        "gpt2_xl": _gpt2(1600, 25, 48),
        # Brown et al. 2020 (arXiv 2005.14165), table 2.1. Every block attends densely here; the
        # paper alternates with locally banded sparse attention, of the same parameters.
        "gpt3_175b": GPTConfig(
            vocab_size=50257, max_positions=2048, hidden_size=12288, num_heads=96, num_layers=96
        ),
        # Smith et al. 2022 (arXiv 2201.11990), section 3.1; the vocabulary is GPT-2's, padded to
        # a multiple of 128 · 8 for the 8-way tensor parallelism of the run, as in the 529.6
        # billion of Narayanan et al. 2021 (arXiv 2104.04473), table 1.
        "mt_nlg_530b": GPTConfig(
            vocab_size=51200, max_positions=2048, hidden_size=20480, num_heads=128, num_layers=105
        ),
        # Thoppilan et al. 2022 (arXiv 2201.08239), section 3 (64 layers, d_model 8192, d_ff
        # 65536, 128 heads of 128, gated GELU, 32,000 SentencePiece tokens). The kernels of the
        # blocks are the paper's 137 billion. Different here: rotary positions instead of T5's
        # relative attention biases; RMS norm, an untied output projection and 2,048 positions
        # are our choice, since the paper does not say.
        "lamda_137b": LlamaConfig(
            vocab_size=32000,
            max_positions=2048,
            hidden_size=8192,
            num_heads=128,
            num_layers=64,
            feed_forward_size=65536,
            head_dim=128,
            activation="gelu",
        ),
        # For laptops: the Llama counterpart of gpt_tiny, two query heads to a key-value head,
        # 803,968 parameters. Ours.
        "llama_tiny": LlamaConfig(
            vocab_size=256,
            max_positions=128,
            hidden_size=128,
            num_heads=8,
            num_kv_heads=4,
            num_layers=4,
            feed_forward_size=352,
        ),
        # Touvron et al. 2023 (arXiv 2307.09288), table 1, and the released params.json.
        "llama2_7b": LlamaConfig(
            vocab_size=32000,
            max_positions=4096,
            hidden_size=4096,
            num_heads=32,
            num_layers=32,
            feed_forward_size=11008,
        ),
        # Llama Team 2024 (arXiv 2407.21783), table 3.
        "llama3_8b": _llama3(4096, 32, 32, 14336),
        "llama3_70b": _llama3(8192, 64, 80, 28672),
        "llama3_405b": _llama3(16384, 128, 126, 53248),
        # For laptops: llama_tiny with eight experts of half its width, two to a token, so that a
        # token meets as many parameters: 808,064 of 2,430,080. Ours.
        "moe_tiny": MixtralConfig(
            vocab_size=256,
            max_positions=128,
            hidden_size=128,
            num_heads=8,
            num_kv_heads=4,
            num_layers=4,
            feed_forward_size=176,
            num_experts=8,
            num_experts_per_token=2,
        ),
        # Jiang et al. 2024 (arXiv 2401.04088), table 1, and the released params.json (its rotary
        # base of 1,000,000). The paper counts 47 and 13 billion, total and for each token.
        "mixtral_8x7b": MixtralConfig(
            vocab_size=32000,
            max_positions=32768,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            num_layers=32,
            feed_forward_size=14336,
            num_experts=8,
            num_experts_per_token=2,
            rope_theta=1000000.0,
        ),
    }
)


def get_preset(name: str) -> ModelConfig:
    """Returns the configuration of a preset.

    `lamda_137b` is the one that is not its paper's architecture to the letter: it is a Llama with
    LaMDA's sizes and gated GELU, with rotary positions in place of T5's relative attention biases,
    and with RMS norm, an untied output projection and 2,048 positions, which the paper leaves open.

    Args:
        name: a key of `PRESETS`.

    Returns:
        The configuration; change one of its fields with `dataclasses.replace`.

    Raises:
        ValueError: there is no such preset. The message names the nearest ones.

    Example:
        >>> get_preset("gpt2_small").num_parameters()
        124439808
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), PRESETS, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"There is no such preset. Received: {name!r}. {hint}The presets are {', '.join(PRESETS)}."
    )
