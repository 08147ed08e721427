"""The experts of a mixture: as many feed-forward networks, each for its own rows."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.layers.activation_sharding import current_stream
from llmos_tf.layers.dispatch import AXIS, apply_at_owners, apply_grouped
from llmos_tf.sharding import layout_of, local_slice


class Experts(keras.layers.Layer):
    """Gated feed-forward networks, one of which computes each row: (act(x A_e) ∘ x C_e) B_e.

    Each expert multiplies the rows that it was sent, sorted and split by counts: no padding. With
    kernels cut over `expert` the rows travel, where ranks of the axis hold different ones; where
    they hold the same, a rank gives zero for rows of other ranks' experts. With kernels cut over
    `tensor` the result is a partial sum.

    Args:
        hidden_size: D.
        feed_forward_size: F.
        num_experts: E.
        activation: name or function.
        initializer: of the kernels ``[E, D, 2, F]`` and ``[E, F, D]``.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: rows ``[n, D]``.
        experts: int32 ``[n]``, the expert of each; E for none.

    Call returns:
        ``[n, D]``, zero for rows without an expert.

    Raises:
        ValueError: an initializer that scales by the kernel's shape.
    """

    def __init__(
        self,
        hidden_size: int,
        feed_forward_size: int,
        num_experts: int,
        activation: Any = "silu",
        initializer: Any = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.hidden_size = hidden_size
        self.feed_forward_size = feed_forward_size
        self.num_experts = num_experts
        self.activation = keras.activations.get(activation)
        self.initializer = keras.initializers.get(initializer)
        if isinstance(self.initializer, keras.initializers.VarianceScaling):
            raise ValueError(
                "The kernels of all experts are drawn at once, and their initializer must not "
                "scale by the shape. Give one such as RandomNormal(stddev=0.02). "
                f"Received: {self.initializer!r}."
            )

    def build(self, input_shape: Any = None) -> None:
        """Makes the kernels.

        Args:
            input_shape: not needed.
        """
        experts, hidden, inner = self.num_experts, self.hidden_size, self.feed_forward_size
        self.up = self.add_weight(
            name="up", shape=(experts, hidden, 2, inner), initializer=self.initializer.clone()
        )
        self.down = self.add_weight(
            name="down", shape=(experts, inner, hidden), initializer=self.initializer.clone()
        )

    def share_tokens(self) -> bool:
        """Returns whether ranks of the `expert` axis have other experts and the same tokens."""
        return self._are_cut() and not _is_stream_split()

    def call(self, x: tf.Tensor, experts: tf.Tensor) -> tf.Tensor:
        if not self._are_cut():
            return apply_grouped(self._apply, x, experts, self.num_experts)
        if not self.share_tokens():
            return apply_at_owners(self._apply, x, experts, self.num_experts)
        owned = self.num_experts // collectives.axis_size(AXIS)
        mine = experts - collectives.axis_index(AXIS) * owned
        mine = tf.where((mine >= 0) & (mine < owned), mine, owned)
        return apply_grouped(self._apply, x, mine, owned)

    def _are_cut(self) -> bool:
        layout = layout_of(self.up)
        return layout is not None and AXIS in layout.dims

    def _apply(self, x_nD: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        """Rows sorted by expert, through this rank's slices of the kernels."""
        up, down = local_slice(self.up), local_slice(self.down)
        num_experts, hidden, _, inner = up.shape
        up = tf.unstack(tf.reshape(up, [num_experts, hidden, 2 * inner]))
        both_nF = _products(x_nD, up, counts)
        hidden_nF = self.activation(both_nF[:, :inner]) * both_nF[:, inner:]
        return _products(hidden_nF, tf.unstack(down), counts)


def _products(x_nD: tf.Tensor, kernels: list[tf.Tensor], counts: tf.Tensor) -> tf.Tensor:
    """The product of each group of rows with its kernel."""
    groups = tf.split(x_nD, counts, num=len(kernels))
    return tf.concat([tf.matmul(x, kernel) for x, kernel in zip(groups, kernels, strict=True)], 0)


def _is_stream_split() -> bool:
    """Whether ranks of the `expert` axis hold different tokens."""
    stream = current_stream()
    return stream is not None and AXIS in stream.axes
