"""Configurations of the models: frozen dataclasses that are checked when they are made.

A configuration knows how many parameters its model has and how many operations a step takes,
without a model being built and without TensorFlow, so that planning and the scripts can use it.
"""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

__all__ = ["GPTConfig", "LlamaConfig", "MixtralConfig", "ModelConfig"]

# Activations of a gated feed-forward block; "gelu" is the tanh approximation.
ACTIVATIONS = ("silu", "gelu")
# A Python integer may be larger.
_LARGEST = sys.float_info.max


def _check_integer(name: str, value: Any) -> None:
    # bool is an int in Python, and True heads are a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is a positive integer. Received: {name}={value!r}.")


def _check_positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= _LARGEST:
        raise ValueError(f"`{name}` is a positive number. Received: {name}={value!r}.")


def _check_not_negative(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= _LARGEST:
        raise ValueError(f"`{name}` is zero or a positive number. Received: {name}={value!r}.")


def _check_dropout(value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ValueError(f"`dropout` is a rate in [0, 1). Received: dropout={value!r}.")


class ModelConfig:
    """What all model configurations have in common."""

    # Name of the architecture in `to_dict`.
    architecture: ClassVar[str]
    max_positions: int
    num_layers: int

    def num_parameters(self) -> int:
        """Returns the number of trainable parameters, by a formula: nothing is built."""
        raise NotImplementedError

    def num_matmul_parameters(self) -> int:
        """Returns how many parameters take part in a matrix product for each token.

        These are the kernels, the output projection among them (which, when it is tied to the
        embedding, is counted here once for its product). Embedding look-ups, biases and norms
        multiply no matrix; of a mixture's experts only those that a token is sent to do.
        """
        raise NotImplementedError

    def attention_width(self) -> int:
        """Returns the number of heads times the size of a head."""
        raise NotImplementedError

    def flops_per_token(self, sequence_length: int) -> int:
        """Returns the model FLOPs of one token, forward and backward.

        A multiplication and an addition are two. A kernel costs 2 forward and 4 backward (one
        product each for its inputs and for itself) per parameter; the scores and the weighted sum
        of attention cost 12 · layers · width · length. They are counted in full: a causal mask
        does not halve them, as in the papers, so that utilisation can be compared with what they
        publish. Recomputation is work of the hardware and not of the model: it is not counted.

        Args:
            sequence_length: positions in a sequence, at most `max_positions`.

        Returns:
            Floating-point operations per token of a training step.

        Raises:
            ValueError: `sequence_length` is not in [1, max_positions].

        Reference:
            Chowdhery et al., PaLM (arXiv 2204.02311), appendix B; Narayanan et al.
            (arXiv 2104.04473), appendix, whose equation 3 adds recomputation.
        """
        _check_integer("sequence_length", sequence_length)
        if sequence_length > self.max_positions:
            raise ValueError(
                f"`sequence_length` is at most max_positions={self.max_positions}. "
                f"Received: sequence_length={sequence_length}."
            )
        attention = 12 * self.num_layers * self.attention_width() * sequence_length
        return 6 * self.num_matmul_parameters() + attention

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields and the key ``architecture``: plain values that JSON can hold."""
        return {"architecture": self.architecture, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Makes the configuration that `to_dict` wrote.

        Called on `ModelConfig` it makes whichever architecture the data names; called on a
        subclass it makes that one, and the key ``architecture`` may be left out.

        Args:
            data: field name to value, and the key ``architecture``.

        Returns:
            A configuration equal to the one that was written.

        Raises:
            ValueError: an unknown architecture or another one than the class's, a key that is not
                a field, a missing field, or a value that the field does not take.

        Example:
            >>> config = GPTConfig(
            ...     vocab_size=256, max_positions=64, hidden_size=32, num_heads=4, num_layers=2
            ... )
            >>> ModelConfig.from_dict(config.to_dict()) == config
            True
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"A configuration is a mapping of fields. Received: {data!r}.")
        values = dict(data)
        architecture = values.pop("architecture", getattr(cls, "architecture", None))
        target = _ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
        if target is None or not issubclass(target, cls):
            known = [name for name, kind in _ARCHITECTURES.items() if issubclass(kind, cls)]
            raise ValueError(
                f"{cls.__name__} reads the architectures {', '.join(known)}. "
                f"Received: architecture={architecture!r}."
            )
        names = [field.name for field in fields(target)]
        unknown = [key for key in values if key not in names]
        if unknown:
            raise ValueError(
                f"{target.__name__} has the fields {', '.join(names)}. "
                f"Received also: {', '.join(map(repr, unknown))}."
            )
        missing = [
            field.name
            for field in fields(target)
            if field.default is MISSING and field.name not in values
        ]
        if missing:
            raise ValueError(
                f"{target.__name__} needs the fields {', '.join(missing)} as well. "
                f"Received: {', '.join(values)}."
            )
        return target(**values)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """The GPT-2 architecture (Radford et al. 2019), which GPT-3 and MT-NLG share.

    Learned positions, layer norm before each sub-block and after the last, biases everywhere,
    GELU (tanh approximation) between the two feed-forward kernels, and an output projection that
    is the embedding, transposed.

    Args:
        vocab_size: number of tokens.
        max_positions: longest sequence, in tokens.
        hidden_size: width of a token between blocks; a multiple of `num_heads`.
        num_heads: attention heads of a block.
        num_layers: blocks.
        feed_forward_size: width between the feed-forward kernels; None for 4 · hidden_size, which
            is then what the field holds.
        dropout: rate of dropout of embeddings, attention weights and the output of each
            sub-block, in [0, 1).
        layer_norm_epsilon: added to the variance.

    Raises:
        ValueError: a value out of its range, or heads that do not divide the hidden size.

    Example:
        >>> config = GPTConfig(
        ...     vocab_size=50257, max_positions=1024, hidden_size=768, num_heads=12, num_layers=12
        ... )
        >>> config.num_parameters()
        124439808
    """

    architecture: ClassVar[str] = "gpt"

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_heads: int
    num_layers: int
    feed_forward_size: int | None = None
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "max_positions", "hidden_size", "num_heads", "num_layers"):
            _check_integer(name, getattr(self, name))
        if self.feed_forward_size is None:
            object.__setattr__(self, "feed_forward_size", 4 * self.hidden_size)
        _check_integer("feed_forward_size", self.feed_forward_size)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                "`hidden_size` is a multiple of `num_heads`. "
                f"Received: hidden_size={self.hidden_size}, num_heads={self.num_heads}."
            )
        _check_dropout(self.dropout)
        _check_positive("layer_norm_epsilon", self.layer_norm_epsilon)

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_heads

    def attention_width(self) -> int:
        """Returns the number of heads times the size of a head: the hidden size."""
        return self.hidden_size

    def num_matmul_parameters(self) -> int:
        """Returns how many parameters take part in a matrix product for each token."""
        h, f = self.hidden_size, self.feed_forward_size
        return self.num_layers * (4 * h * h + 2 * h * f) + self.vocab_size * h

    def num_parameters(self) -> int:
        """Returns the number of trainable parameters, by a formula: nothing is built."""
        h, f = self.hidden_size, self.feed_forward_size
        # Biases of query, key, value (3h), attention output (h), feed-forward (f + h); two norms
        # with scale and shift (4h).
        vectors = 9 * h + f
        # The output projection is the embedding, which num_matmul_parameters counts.
        positions_and_final_norm = self.max_positions * h + 2 * h
        return self.num_matmul_parameters() + self.num_layers * vectors + positions_and_final_norm


@dataclass(frozen=True, kw_only=True)
class _LlamaFamilyConfig(ModelConfig):
    """What Llama and its mixture of experts share: all but the feed-forward half of a block."""

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    num_layers: int
    feed_forward_size: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rms_norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    activation: str = "silu"
    dropout: float = 0.0

    def __post_init__(self):
        for name in (
            "vocab_size",
            "max_positions",
            "hidden_size",
            "num_heads",
            "num_layers",
            "feed_forward_size",
        ):
            _check_integer(name, getattr(self, name))
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        _check_integer("num_kv_heads", self.num_kv_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                "`num_heads` is a multiple of `num_kv_heads`. "
                f"Received: num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    "`hidden_size` is a multiple of `num_heads`, unless `head_dim` is given. "
                    f"Received: hidden_size={self.hidden_size}, num_heads={self.num_heads}."
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _check_integer("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise ValueError(
                "Rotary positions turn pairs: `head_dim` is even. "
                f"Received: head_dim={self.head_dim} "
                f"(hidden_size={self.hidden_size}, num_heads={self.num_heads})."
            )
        _check_positive("rope_theta", self.rope_theta)
        _check_positive("rms_norm_epsilon", self.rms_norm_epsilon)
        if not isinstance(self.tie_embeddings, bool):
            raise ValueError(
                "`tie_embeddings` is True or False. "
                f"Received: tie_embeddings={self.tie_embeddings!r}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` is one of {', '.join(ACTIVATIONS)}. "
                f"Received: activation={self.activation!r}."
            )
        _check_dropout(self.dropout)

    def attention_width(self) -> int:
        """Returns the number of query heads times the size of a head."""
        return self.num_heads * self.head_dim

    def num_matmul_parameters(self) -> int:
        """Returns how many parameters take part in a matrix product for each token."""
        h = self.hidden_size
        query_and_output = 2 * h * self.attention_width()
        key_and_value = 2 * h * self.num_kv_heads * self.head_dim
        block = query_and_output + key_and_value + self._feed_forward_matmul_parameters()
        return self.num_layers * block + self.vocab_size * h

    def num_parameters(self) -> int:
        """Returns the number of trainable parameters, by a formula: nothing is built."""
        h = self.hidden_size
        norms = (2 * self.num_layers + 1) * h
        # A tied output projection is the embedding, which num_matmul_parameters counts.
        embedding = 0 if self.tie_embeddings else self.vocab_size * h
        return self.num_matmul_parameters() + embedding + norms

    def _feed_forward_matmul_parameters(self) -> int:
        """Of a block's feed-forward half, for each token."""
        return 3 * self.hidden_size * self.feed_forward_size


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(_LlamaFamilyConfig):
    """The Llama architecture (Touvron et al., arXiv 2302.13971; Llama 2 and 3 with grouped heads).

    RMS norm before each sub-block and after the last, rotary positions, grouped-query attention,
    a gated feed-forward block act(x·W_gate) ⊙ (x·W_up) · W_down, and no biases.

    Args:
        vocab_size: number of tokens.
        max_positions: longest sequence, in tokens.
        hidden_size: width of a token between blocks.
        num_heads: query heads of a block.
        num_kv_heads: key and value heads of a block, a divisor of `num_heads`; None for as many
            as `num_heads`, which is then what the field holds.
        num_layers: blocks.
        feed_forward_size: width of the gated feed-forward block.
        head_dim: size of a head, even, since rotary positions turn pairs; None for
            hidden_size / num_heads, which is then what the field holds.
        rope_theta: base of the rotary wavelengths.
        rms_norm_epsilon: added to the mean square.
        tie_embeddings: whether the output projection is the embedding, transposed.
        activation: "silu" (SwiGLU) or "gelu" (gated GELU, tanh approximation).
        dropout: rate of dropout of embeddings, attention weights and the output of each
            sub-block, in [0, 1).

    Raises:
        ValueError: a value out of its range, or heads that do not divide.

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=32000, max_positions=4096, hidden_size=4096, num_heads=32,
        ...     num_layers=32, feed_forward_size=11008,
        ... )
        >>> config.num_parameters()
        6738415616
    """

    architecture: ClassVar[str] = "llama"


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(_LlamaFamilyConfig):
    """The Mixtral architecture (Jiang et al., arXiv 2401.04088): Llama with a mixture of experts.

    In each block a router sends every token to a few of many gated feed-forward networks, the
    experts, and adds up their outputs, weighted by the softmax over the chosen experts' logits.

    Args:
        vocab_size: number of tokens.
        max_positions: longest sequence, in tokens.
        hidden_size: width of a token between blocks.
        num_heads: query heads of a block.
        num_kv_heads: as for `LlamaConfig`.
        num_layers: blocks.
        feed_forward_size: width of one expert.
        num_experts: experts of a block.
        num_experts_per_token: experts that a token is sent to, at most `num_experts`.
        capacity_factor: None for as many tokens as an expert is sent; else an expert takes at most
            factor · length · num_experts_per_token / num_experts tokens of a sequence while it is
            trained, rounded up (see `layers.MoE`).
        load_balance_weight: of the loss that keeps the experts equally busy.
        router_z_weight: of the loss that keeps the router's logits small.
        head_dim: as for `LlamaConfig`.
        rope_theta: base of the rotary wavelengths.
        rms_norm_epsilon: added to the mean square.
        tie_embeddings: whether the output projection is the embedding, transposed.
        activation: "silu" (SwiGLU) or "gelu" (gated GELU, tanh approximation).
        dropout: as for `LlamaConfig`.

    Raises:
        ValueError: a value out of its range, heads that do not divide, or more experts for a token
            than there are.

    Example:
        >>> config = MixtralConfig(
        ...     vocab_size=32000, max_positions=32768, hidden_size=4096, num_heads=32,
        ...     num_kv_heads=8, num_layers=32, feed_forward_size=14336, num_experts=8,
        ...     num_experts_per_token=2,
        ... )
        >>> config.num_parameters(), config.num_active_parameters()
        (46702792704, 12879925248)
    """

    architecture: ClassVar[str] = "mixtral"

    num_experts: int
    num_experts_per_token: int
    capacity_factor: float | None = None
    load_balance_weight: float = 0.01
    router_z_weight: float = 0.001

    def __post_init__(self):
        super().__post_init__()
        _check_integer("num_experts", self.num_experts)
        _check_integer("num_experts_per_token", self.num_experts_per_token)
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                "`num_experts_per_token` is at most `num_experts`. Received: "
                f"num_experts_per_token={self.num_experts_per_token}, "
                f"num_experts={self.num_experts}."
            )
        if self.capacity_factor is not None:
            _check_positive("capacity_factor", self.capacity_factor)
        _check_not_negative("load_balance_weight", self.load_balance_weight)
        _check_not_negative("router_z_weight", self.router_z_weight)

    def num_parameters(self) -> int:
        """Returns the number of trainable parameters, by a formula: nothing is built."""
        idle = self.num_layers * (self.num_experts - self.num_experts_per_token)
        expert = 3 * self.hidden_size * self.feed_forward_size
        return self.num_active_parameters() + idle * expert

    def num_active_parameters(self) -> int:
        """Returns the number of parameters that one token meets, embeddings and norms included."""
        return super().num_parameters()

    def _feed_forward_matmul_parameters(self) -> int:
        """The router, and the experts that a token is sent to."""
        router = self.hidden_size * self.num_experts
        return router + self.num_experts_per_token * super()._feed_forward_matmul_parameters()


_ARCHITECTURES: dict[str, type[ModelConfig]] = {
    config.architecture: config for config in (GPTConfig, LlamaConfig, MixtralConfig)
}
