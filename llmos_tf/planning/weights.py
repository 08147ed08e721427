"""The weights of the models, and how many bytes of each a device holds, by formulas alone.

The tables repeat what `models.layouts` says of them without building a model, so that a plan for
thousands of devices takes no memory. A test compares them with the models.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from llmos_tf.config import GPTConfig, LlamaConfig, MixtralConfig, ModelConfig
from llmos_tf.mesh import Mesh

# Parts of a model that are no block.
FIRST, LAST = "first", "last"


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A trained weight.

    Args:
        name: in its block, or in the model.
        shape: full shape.
        axes: for each dimension the mesh axis along which it is cut, or None.
        units: where it is used: `FIRST` (embeddings), numbers of blocks, `LAST` (last norm and
            logits).
        is_kernel: whether it takes part in a matrix product, whose gradient needs it again.
        is_in_stream: whether it is used between the tensor-parallel regions, where under sequence
            parallelism each rank has its own positions.
        is_shared_by_heads: whether each rank of the tensor axis uses a part of it for its heads.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    units: tuple[str | int, ...]
    is_kernel: bool = False
    is_in_stream: bool = False
    is_shared_by_heads: bool = False

    def slice_elements(self, mesh: Mesh) -> int:
        """Returns the elements that a rank computes with: those of its slice.

        Args:
            mesh: the mesh.

        Returns:
            Elements; of a dimension that an axis does not divide, rounded up.
        """
        return math.prod(
            length if axis is None else -(-length // mesh.axis_size(axis))
            for length, axis in zip(self.shape, self.axes, strict=True)
        )

    def part_elements(self, mesh: Mesh, flat: Iterable[str] = ("fsdp",)) -> int:
        """Returns the elements that a rank stores.

        Args:
            mesh: the mesh.
            flat: axes along which the flattened slice is cut in turn.

        Returns:
            Elements, padding included.
        """
        length = self.slice_elements(mesh)
        for axis in flat:
            length = -(-length // mesh.axis_size(axis))
        return length


def weights_of(config: ModelConfig, mesh: Mesh) -> list[Weight]:
    """Returns the weights of a model.

    Args:
        config: a `GPTConfig`, `LlamaConfig` or `MixtralConfig`.
        mesh: over which they are cut.

    Returns:
        Its weights.

    Raises:
        ValueError: a configuration of another kind, or an axis that does not divide what it cuts.
    """
    if not isinstance(config, GPTConfig | LlamaConfig | MixtralConfig):
        raise ValueError(
            "The formulas are those of a GPTConfig, LlamaConfig or MixtralConfig. "
            f"Received: {type(config).__name__}."
        )
    make = _gpt if isinstance(config, GPTConfig) else _llama
    weights = make(config, mesh)
    for weight in weights:
        _check_divides(weight, mesh)
    return weights


def _gpt(config: GPTConfig, mesh: Mesh) -> list[Weight]:
    del mesh
    d, f, n, h = config.hidden_size, config.feed_forward_size, config.num_heads, config.head_dim
    weights = [
        _weight("token_embedding/table", (config.vocab_size, d), ("tensor", None), FIRST, LAST),
        _vector("position_embedding/table", (config.max_positions, d), FIRST),
    ]
    for i in range(config.num_layers):
        weights += [
            *(_vector(f"{norm}/{kind}", (d,), i) for norm in _NORMS for kind in ("gamma", "beta")),
            _weight("query_key_value/kernel", (d, 3, n, h), (None, None, "tensor", None), i),
            _vector("query_key_value/bias", (3, n, h), i, axes=(None, "tensor", None)),
            _weight("output/kernel", (n, h, d), ("tensor", None, None), i),
            _vector("output/bias", (d,), i),
            _weight("up/kernel", (d, f), (None, "tensor"), i),
            _vector("up/bias", (f,), i, axes=("tensor",)),
            _weight("down/kernel", (f, d), ("tensor", None), i),
            _vector("down/bias", (d,), i),
        ]
    return [*weights, *(_vector(f"final_norm/{kind}", (d,), LAST) for kind in ("gamma", "beta"))]


def _llama(config: LlamaConfig | MixtralConfig, mesh: Mesh) -> list[Weight]:
    d, n, k, h = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    vocabulary, rows = (config.vocab_size, d), ("tensor", None)
    tied = (LAST,) if config.tie_embeddings else ()
    weights = [_weight("token_embedding/table", vocabulary, rows, FIRST, *tied)]
    if not tied:
        weights.append(_weight("output_embedding/table", vocabulary, rows, LAST))
    # Heads that the axis does not divide are whole on every rank.
    kv_axis = "tensor" if k % mesh.axis_size("tensor") == 0 else None
    feed_forward = _experts if isinstance(config, MixtralConfig) else _gated
    for i in range(config.num_layers):
        weights += [_vector(f"{norm}/scale", (d,), i) for norm in _NORMS]
        if n == k:
            kernel = ("query_key_value/kernel", (d, 3, n, h), (None, None, "tensor", None))
            weights.append(_weight(*kernel, i))
        else:
            weights += [
                _weight("query/kernel", (d, n, h), (None, "tensor", None), i),
                replace(
                    _weight("key_value/kernel", (d, 2, k, h), (None, None, kv_axis, None), i),
                    is_shared_by_heads=kv_axis is None,
                ),
            ]
        weights.append(_weight("output/kernel", (n, h, d), ("tensor", None, None), i))
        weights += feed_forward(config, i)
    return [*weights, _vector("final_norm/scale", (d,), LAST)]


def _gated(config: LlamaConfig, block: int) -> list[Weight]:
    d, f = config.hidden_size, config.feed_forward_size
    return [
        _weight("up/kernel", (d, 2, f), (None, None, "tensor"), block),
        _weight("down/kernel", (f, d), ("tensor", None), block),
    ]


def _experts(config: MixtralConfig, block: int) -> list[Weight]:
    d, f, e = config.hidden_size, config.feed_forward_size, config.num_experts
    return [
        replace(_weight("router/kernel", (d, e), (None, None), block), is_in_stream=True),
        _weight("experts/up", (e, d, 2, f), ("expert", None, None, "tensor"), block),
        _weight("experts/down", (e, f, d), ("expert", "tensor", None), block),
    ]


_NORMS = ("attention_norm", "feed_forward_norm")


def _weight(name: str, shape: tuple, axes: tuple, *units: str | int) -> Weight:
    return Weight(name=name, shape=shape, axes=axes, units=units, is_kernel=True)


def _vector(name: str, shape: tuple, *units: str | int, axes: tuple | None = None) -> Weight:
    whole = (None,) * len(shape)
    return Weight(
        name=name, shape=shape, axes=axes or whole, units=units, is_in_stream=axes is None
    )


def _check_divides(weight: Weight, mesh: Mesh) -> None:
    if weight.name.endswith("/table"):
        # A vocabulary is padded.
        return
    for length, axis in zip(weight.shape, weight.axes, strict=True):
        if axis is not None and length % mesh.axis_size(axis):
            raise ValueError(
                f"The axis {axis} of size {mesh.axis_size(axis)} does not divide the dimension of "
                f"{length} of {weight.name}, of shape {weight.shape}. Choose a size of {axis} that "
                f"divides {length}."
            )


def total(weights: Iterable[Weight], count: Callable[[Weight], int]) -> int:
    """Returns a sum over weights.

    Args:
        weights: the weights.
        count: what is summed of one.

    Returns:
        The sum.
    """
    return sum(count(weight) for weight in weights)
