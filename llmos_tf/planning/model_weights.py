"""The weights of a model, by the formulas of its architecture. No TensorFlow."""

import math
from typing import NamedTuple

from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig, ModelConfig
from llmos_tf.mesh import Mesh

Axes = tuple[str | None, ...]


class Weight(NamedTuple):
    """A weight that is trained, and how it lies on a mesh.

    Args:
        shape: of the whole.
        axes: for each dimension the axis that cuts it, or None; a last slice is filled up.
        is_in_stream: whether it is used between the tensor-parallel regions, where under sequence
            parallelism each rank has its own positions.
        is_shared_by_heads: whether each rank of the tensor axis uses a part of it for its heads.
    """

    shape: tuple[int, ...]
    axes: Axes = ()
    is_in_stream: bool = False
    is_shared_by_heads: bool = False

    def slice_elements(self, mesh: Mesh) -> int:
        """Returns the elements of a rank's slice, before flat cuts.

        Args:
            mesh: the mesh.

        Returns:
            Number of elements.
        """
        axes = self.axes or (None,) * len(self.shape)
        return math.prod(
            length if axis is None else -(-length // mesh.axis_size(axis))
            for length, axis in zip(self.shape, axes, strict=True)
        )


class ModelWeights(NamedTuple):
    """The weights of a model, by where they are used.

    Args:
        embedding: those before the first block, without the token table.
        block: those of each block.
        head: those after the last block, without the output table.
        table: token table; V × D.
        is_tied: whether it is the output table too, or that is another one of its shape.
    """

    embedding: list[Weight]
    block: list[Weight]
    head: list[Weight]
    table: Weight
    is_tied: bool


def weights_of(config: ModelConfig, mesh: Mesh) -> ModelWeights:
    """Returns the weights of a GPT, Llama or Mixtral.

    Args:
        config: its sizes.
        mesh: which axes cut them.

    Returns:
        The weights.

    Raises:
        ValueError: another architecture.
    """
    if not isinstance(config, GPTConfig | LlamaConfig | MixtralConfig):
        raise ValueError(
            f"The formulas are those of GPT, Llama and Mixtral. Received: {type(config).__name__}."
        )
    hidden, inner = config.hidden_size, config.feed_forward_size
    table = Weight((config.vocab_size, hidden), ("tensor", None))
    vector = Weight((hidden,), is_in_stream=True)
    if isinstance(config, GPTConfig):
        heads = (config.num_heads, config.head_dim)
        block = [
            *[vector] * 4,  # scale and shift of two norms
            Weight((hidden, 3, *heads), (None, None, "tensor", None)),
            Weight((3, *heads), (None, "tensor", None)),
            Weight((*heads, hidden), ("tensor", None, None)),
            vector,
            Weight((hidden, inner), (None, "tensor")),
            Weight((inner,), ("tensor",)),
            Weight((inner, hidden), ("tensor", None)),
            vector,
        ]
        positions = Weight((config.max_positions, hidden), is_in_stream=True)
        return ModelWeights([positions], block, [vector, vector], table, is_tied=True)
    block = [vector, vector, *_llama_attention(config, mesh)]
    if isinstance(config, MixtralConfig):
        experts = config.num_experts
        block += [
            Weight((hidden, experts), is_in_stream=True),
            Weight((experts, hidden, 2, inner), ("expert", None, None, "tensor")),
            Weight((experts, inner, hidden), ("expert", "tensor", None)),
        ]
    else:
        block += [
            Weight((hidden, 2, inner), (None, None, "tensor")),
            Weight((inner, hidden), ("tensor", None)),
        ]
    return ModelWeights([], block, [vector], table, config.tie_embeddings)


def _llama_attention(config: LlamaConfig | MixtralConfig, mesh: Mesh) -> list[Weight]:
    hidden, heads, width = config.hidden_size, config.num_heads, config.head_dim
    output = Weight((heads, width, hidden), ("tensor", None, None))
    if config.num_kv_heads == heads:
        return [Weight((hidden, 3, heads, width), (None, None, "tensor", None)), output]
    key_value = (hidden, 2, config.num_kv_heads, width)
    query = Weight((hidden, heads, width), (None, "tensor", None))
    if config.num_kv_heads % mesh.axis_size("tensor"):
        return [query, Weight(key_value, is_shared_by_heads=True), output]
    return [query, Weight(key_value, (None, None, "tensor", None)), output]
