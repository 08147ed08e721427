"""A mixture of experts in place of the feed-forward half of a block."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.collectives import batch
from llmos_tf.graph.outlined_function import NotABlock
from llmos_tf.layers.activation_sharding import current_stream
from llmos_tf.layers.capacity import within_capacity
from llmos_tf.layers.dispatch import AXIS
from llmos_tf.layers.dropout import Dropout
from llmos_tf.layers.experts import Experts
from llmos_tf.layers.router import Router, Routing, load_balance_loss, router_z_loss
from llmos_tf.layers.tensor_region import AXIS as TENSOR
from llmos_tf.layers.tensor_region import TensorRegion
from llmos_tf.mesh import BATCH_AXES
from llmos_tf.spmd.program import current_program


class MoE(keras.layers.Layer):
    """Y = Σ_k w_k (act(X A_e) ∘ X C_e) B_e over the K experts e = e_k that a router chose for X.

    A_e and C_e lie side by side in one kernel ``[E, D, 2, F]``, B_e in ``[E, F, D]``. Layouts may
    cut both over `expert` by experts, and over `tensor` by columns and rows as a feed-forward
    layer's. With kernels cut over `expert` there are two ways:

    - Ranks of the axis hold different tokens (`layers.activation_sharding`, as in the models of
      this project): a token's row travels to the ranks of its experts by all-to-all and its result
      back; backward likewise.
    - They hold the same tokens, as in any other Keras model and in decoding: each computes with its
      own experts, and the sum over the axis is Y; backward, gradients of X and w are summed.

    Without a capacity every choice is computed. With one, each sequence has room for
    ceil(factor · T · K / E) choices of an expert in training, first come, first served. What has no
    room adds nothing to Y, so that the token passes by the residual connection around the layer.
    The same tokens are dropped on every mesh (see `layers.capacity`); outside of training none are.

    In training two losses are added, by their weights: that of load balance and the router's z-loss
    (`layers.router`). On a mesh they are those of one device with the whole batch; in a pipeline
    the load is that of each microbatch, as the others are not there yet. And `load`, a weight that
    is not trained, notes the share of the last batch's choices that fell on each expert; with a
    capacity `dropped` notes the share that had no room.

    Args:
        hidden_size: D.
        feed_forward_size: F, width of one expert.
        num_experts: E.
        num_experts_per_token: K, at most E.
        activation: name or function.
        capacity_factor: room for choices over E equally busy experts', or None for no limit.
        load_balance_weight: of the loss that keeps experts equally busy.
        router_z_weight: of the loss that keeps the router's logits small.
        dropout: rate on Y.
        initializer: of all kernels, drawn for all experts at once; its spread must not depend on
            a kernel's shape. None for a normal one of standard deviation 0.02.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, of the residual stream.
        training: whether to drop, to add losses, and to note the load.

    Call returns:
        Tensor like `x`.

    Raises:
        ValueError: more experts for a token than there are, an initializer that scales by the
            kernel's shape, or, in a call, an `x` of another rank.

    Example:
        >>> layer = MoE(256, 512, num_experts=8, num_experts_per_token=2)
        >>> y = x + layer(x, training=True)

    Reference:
        Jiang et al., Mixtral of Experts (arXiv 2401.04088); Lepikhin et al., GShard (arXiv
        2006.16668); Fedus et al., Switch Transformers (arXiv 2101.03961).
    """

    def __init__(
        self,
        hidden_size: int,
        feed_forward_size: int,
        num_experts: int,
        num_experts_per_token: int = 2,
        activation: Any = "silu",
        capacity_factor: float | None = None,
        load_balance_weight: float = 0.01,
        router_z_weight: float = 0.001,
        dropout: float = 0.0,
        initializer: Any = None,
        name: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        if not 1 <= num_experts_per_token <= num_experts:
            raise ValueError(
                "A token is sent to at least one expert and at most all of them. Received: "
                f"num_experts_per_token={num_experts_per_token}, num_experts={num_experts}."
            )
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor is a positive number or None. Received: {capacity_factor!r}."
            )
        # The number of rows of an expert is not static. On a mesh the layer stays out of what XLA
        # compiles by itself, and the layers around it need not.
        self.supports_jit = getattr(tf.distribute.get_strategy().extended, "mesh", None) is not None
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.load_balance_weight = load_balance_weight
        self.router_z_weight = router_z_weight
        initializer = keras.initializers.get(
            initializer or keras.initializers.RandomNormal(stddev=0.02)
        )
        self.router = Router(
            hidden_size, num_experts, num_experts_per_token, initializer.clone(), name="router"
        )
        self.experts = Experts(
            hidden_size, feed_forward_size, num_experts, activation, initializer, name="experts"
        )
        self.dropout = Dropout(dropout, name="dropout")

    def build(self, input_shape: Any = None) -> None:
        """Makes the weights.

        Args:
            input_shape: not needed.
        """
        self.router.build()
        self.experts.build()
        self.load = self.add_weight(
            name="load", shape=(self.num_experts,), initializer="zeros", trainable=False
        )
        if self.capacity_factor is not None:
            self.dropped = self.add_weight(
                name="dropped", shape=(), initializer="zeros", trainable=False
            )

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        if x.shape.rank != 3:
            raise ValueError(
                "A mixture layer takes [rows, positions, width]. "
                f"Received: a tensor of shape {tuple(x.shape)}. Reshape it."
            )
        program = current_program()
        if program is not None and program.block is not None and program.block.compiled:
            raise NotABlock("how many rows an expert has is not static")
        routing = self.router(x)
        experts_BTK = routing.experts_BTK
        if training and self.capacity_factor is not None:
            experts_BTK = within_capacity(experts_BTK, self.num_experts, self.capacity_factor)
        if training:
            self._watch(routing, experts_BTK)
        return self.dropout(self._mix(x, routing, experts_BTK), training=training)

    def _mix(self, x: tf.Tensor, routing: Routing, experts_BTK: tf.Tensor) -> tf.Tensor:
        tensor = TensorRegion(self.experts.up)
        weights_BTK = tensor.enter(tf.cast(routing.weights_BTK, x.dtype))
        experts_BTK = tensor.enter(experts_BTK)
        x_BTD = tensor.enter(x)
        tokens_are_shared = self.experts.share_tokens()
        if tokens_are_shared:
            x_BTD = collectives.copy_to_axis(x_BTD, AXIS)
            weights_BTK = collectives.copy_to_axis(weights_BTK, AXIS)
        shape = tf.shape(x_BTD)
        num_choices = experts_BTK.shape[-1]
        x_nD = tf.reshape(x_BTD, [-1, x.shape[-1]])
        # One row for each choice.
        rows = tf.reshape(tf.tile(x_nD[:, tf.newaxis], [1, num_choices, 1]), [-1, x.shape[-1]])
        y = self.experts(rows, tf.reshape(experts_BTK, [-1]))
        y_nKD = tf.reshape(y, [-1, num_choices, x.shape[-1]])
        y_nD = tf.reduce_sum(y_nKD * tf.reshape(weights_BTK, [-1, num_choices, 1]), axis=1)
        y_BTD = tf.reshape(y_nD, shape)
        if tokens_are_shared:
            y_BTD = collectives.reduce_from_axis(y_BTD, AXIS)
        return tf.ensure_shape(tensor.leave(y_BTD), x.shape)

    def _watch(self, routing: Routing, kept_BTK: tf.Tensor) -> None:
        """Adds the losses and notes the load."""
        is_chosen = tf.one_hot(routing.experts_BTK, self.num_experts, dtype=tf.int32)
        num_kept = tf.math.count_nonzero(kept_BTK < self.num_experts, dtype=tf.int32)
        counts = tf.concat([tf.reduce_sum(is_chosen, [0, 1, 2]), [num_kept]], 0)
        counts = _over_the_batch(counts)
        # A batch may have no rows.
        num_chosen = tf.maximum(tf.reduce_sum(counts[:-1]), 1)
        share_E = tf.cast(counts[:-1] / num_chosen, routing.logits_BTE.dtype)
        loss = self.load_balance_weight * load_balance_loss(routing.logits_BTE, share_E)
        loss += self.router_z_weight * router_z_loss(routing.logits_BTE)
        axes = _token_axes()
        if axes:
            # Each rank's loss is a mean over as many tokens; of the gradient each has its own.
            loss = collectives.reduce_from_axis(loss / collectives.axis_size(axes), axes)
        self.add_loss(loss)
        self.load.assign(tf.cast(share_E, self.variable_dtype))
        if self.capacity_factor is not None:
            self.dropped.assign(tf.cast(1 - counts[-1] / num_chosen, self.variable_dtype))

    def compute_output_shape(self, input_shape: Any, **kwargs: Any) -> Any:
        """Returns the shape of the output.

        Args:
            input_shape: of `x`.
            **kwargs: not needed.

        Returns:
            `input_shape`.
        """
        del kwargs
        return input_shape


def _over_the_batch(count: tf.Tensor) -> tf.Tensor:
    """The sum over all ranks that hold different tokens, the same on every rank."""
    if current_program() is None:
        return count
    return collectives.all_reduce(batch.counted(count), (*BATCH_AXES, *_token_axes()))


def _token_axes() -> tuple[str, ...]:
    """Axes whose ranks hold different tokens of the same rows of the batch."""
    program, stream = current_program(), current_stream()
    if program is None:
        return ()
    axes = () if stream is None else stream.axes
    return (*axes, TENSOR) if program.sequence_parallel else axes
