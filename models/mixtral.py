"""Mixtral (arXiv 2401.04088): Llama with a mixture of experts in each block."""

from typing import Any

import keras
import tensorflow as tf

from llmos_tf.config import MixtralConfig
from llmos_tf.layers import MoE
from llmos_tf.models.layouts import mixtral_layouts
from llmos_tf.models.llama import Llama, LlamaBlock
from llmos_tf.sharding import mesh_axis_size


class MixtralBlock(LlamaBlock):
    """x + attention(norm(x)), then x + mixture(norm(x)), without biases.

    Args:
        config: sizes.
        name: layer name.
        **kwargs: as for `keras.layers.Layer`.

    Call arguments:
        x: ``[B, T, D]``, of the residual stream, and the others, as for `LlamaBlock`.

    Call returns:
        Tensor like `x`; with a cache, (that, the new cache).
    """

    def make_feed_forward(self, config: MixtralConfig, initializer: Any) -> MoE:
        """Makes the mixture.

        Args:
            config: sizes.
            initializer: of its kernels.

        Returns:
            The layer.
        """
        return MoE(
            config.hidden_size,
            config.feed_forward_size,
            config.num_experts,
            config.num_experts_per_token,
            activation=config.activation,
            capacity_factor=config.capacity_factor,
            load_balance_weight=config.load_balance_weight,
            router_z_weight=config.router_z_weight,
            dropout=config.dropout,
            initializer=initializer,
            name="mixture",
        )


@keras.saving.register_keras_serializable(package="llmos_tf")
class Mixtral(Llama):
    """Mixtral: a Llama whose feed-forward layers are mixtures of experts (`layers.MoE`).

    Logs of `fit` show the routing of the last batch, over the blocks: `moe_load_max`, the share of
    choices that the busiest expert of a block got (1 / experts where all are equally busy; 1 /
    experts per token where routing has collapsed), `moe_load_min`, that of the least busy one (0
    where one is dead), and, with a capacity, `moe_dropped`, the share of choices without room.

    Args:
        config: a `MixtralConfig`.
        name: model name.
        **kwargs: as for `keras.Model`.

    Call arguments:
        tokens: integers ``[B, T]``, and the others, as for `LanguageModel`.

    Call returns:
        Logits ``[B, T, V]``; with a cache, (these, the new cache).
    """

    config_class = MixtralConfig
    block_class = MixtralBlock

    def layout_table(self) -> dict[str, Any]:
        """Returns the layouts over tensor and expert axes; see `models.layouts`."""
        return mixtral_layouts(self.config, mesh_axis_size("tensor"))

    def train_step(self, data: Any) -> dict[str, Any]:
        """As `LanguageModel`'s, and notes the routing.

        Args:
            data: this replica's rows.

        Returns:
            Metric results, and those of `routing_summary`.
        """
        return {**super().train_step(data), **self.routing_summary()}

    def routing_summary(self) -> dict[str, tf.Tensor]:
        """Returns how the last batch of training was routed, for logs.

        Returns:
            Scalars by name, as in the class's docstring.
        """
        mixtures = [block.feed_forward for block in self.blocks]
        load_LE = tf.stack([tf.convert_to_tensor(layer.load) for layer in mixtures])
        summary = {"moe_load_max": tf.reduce_max(load_LE), "moe_load_min": tf.reduce_min(load_LE)}
        if self.config.capacity_factor is not None:
            dropped = [tf.convert_to_tensor(layer.dropped) for layer in mixtures]
            summary["moe_dropped"] = tf.reduce_mean(tf.stack(dropped))
        return summary
