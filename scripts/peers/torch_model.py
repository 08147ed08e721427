"""GPT in PyTorch, whole or a stage of it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmos_tf.config import GPTConfig
from llmos_tf.scripts.peers.workload import Workload, fused_by_heads


class Attention(nn.Module):
    """Causal attention with one product for query, key and value.

    Args:
        config: sizes.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        # By heads first, so that a cut of the product's columns is a cut of heads.
        fused = self.query_key_value(x).view(batch, length, -1, 3, self.head_dim)
        q, k, v = fused.transpose(1, 2).unbind(3)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)).

    Args:
        config: sizes.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        width, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.attention_norm = nn.LayerNorm(width, epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(width, epsilon)
        self.up = nn.Linear(width, config.feed_forward_size)
        self.down = nn.Linear(config.feed_forward_size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.feed_forward_norm(x)), approximate="tanh"))


class TorchGPT(nn.Module):
    """GPT-2 with tied embeddings, or a stage of a pipeline of it.

    The first stage has the embeddings, the last one the last norm and the product with the token
    embedding, of which each of the two then has a copy.

    Args:
        config: sizes.
        blocks: indices of its blocks; None for all.
    """

    def __init__(self, config: GPTConfig, blocks: Sequence[int] | None = None):
        super().__init__()
        blocks = range(config.num_layers) if blocks is None else blocks
        self.is_first = blocks[0] == 0
        self.is_last = blocks[-1] == config.num_layers - 1
        width = config.hidden_size
        if self.is_first:
            self.token_embedding = nn.Embedding(config.vocab_size, width)
            self.position_embedding = nn.Embedding(config.max_positions, width)
        self.blocks = nn.ModuleDict({f"block_{i}": Block(config) for i in blocks})
        if self.is_last:
            self.final_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
            self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Makes head and token embedding one parameter, where both are here."""
        if self.is_first and self.is_last:
            self.head.weight = self.token_embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_first:
            positions = torch.arange(x.shape[1], device=x.device)
            x = self.token_embedding(x) + self.position_embedding(positions)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.final_norm(x)) if self.is_last else x


def make_model(workload: Workload, blocks: Sequence[int] | None = None) -> TorchGPT:
    """Makes the model, or a stage, with its initial weights.

    Args:
        workload: what is trained.
        blocks: as for `TorchGPT`.

    Returns:
        The model.
    """
    model, weights = TorchGPT(workload.config, blocks), workload.weights()
    with torch.no_grad():
        if model.is_first:
            _copy(model.token_embedding.weight, weights["token_embedding/table"])
            _copy(model.position_embedding.weight, weights["position_embedding/table"])
        for name, block in model.blocks.items():
            _load_norm(block.attention_norm, f"{name}/attention_norm", weights)
            _load_norm(block.feed_forward_norm, f"{name}/feed_forward_norm", weights)
            fused = f"{name}/attention/query_key_value"
            _copy(
                block.attention.query_key_value.weight, fused_by_heads(weights[f"{fused}/kernel"]).T
            )
            _copy(block.attention.query_key_value.bias, fused_by_heads(weights[f"{fused}/bias"]))
            _load_linear(block.attention.output, f"{name}/attention/output", weights)
            _load_linear(block.up, f"{name}/feed_forward/up", weights)
            _load_linear(block.down, f"{name}/feed_forward/down", weights)
        if model.is_last:
            _load_norm(model.final_norm, "final_norm", weights)
            _copy(model.head.weight, weights["token_embedding/table"])
    return model


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean over tokens.

    Args:
        logits: ``[B, T, V]``.
        labels: int64 ``[B, T]``.

    Returns:
        A scalar.
    """
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _load_linear(layer: nn.Linear, name: str, weights: Mapping[str, np.ndarray]) -> None:
    kernel = weights[f"{name}/kernel"]
    _copy(layer.weight, kernel.reshape(-1, kernel.shape[-1]).T)
    _copy(layer.bias, weights[f"{name}/bias"])


def _load_norm(layer: nn.LayerNorm, name: str, weights: Mapping[str, np.ndarray]) -> None:
    _copy(layer.weight, weights[f"{name}/gamma"])
    _copy(layer.bias, weights[f"{name}/beta"])


def _copy(parameter: nn.Parameter, value: np.ndarray) -> None:
    parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))
