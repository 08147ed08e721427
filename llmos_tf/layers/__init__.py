"""Layers that compute with slices of their weights; plain Keras layers without a mesh."""

from llmos_tf.layers.attention import SelfAttention
from llmos_tf.layers.dense import Dense
from llmos_tf.layers.dropout import Dropout
from llmos_tf.layers.embedding import PositionEmbedding, TokenEmbedding
from llmos_tf.layers.feed_forward import FeedForward
from llmos_tf.layers.losses import TokenCrossEntropy, sharded_cross_entropy
from llmos_tf.layers.mixture import MoE
from llmos_tf.layers.norm import LayerNorm, RMSNorm
from llmos_tf.layers.rotary import rotate
from llmos_tf.layers.tensor_region import TensorRegion, in_stream, stream_positions

__all__ = [
    "Dense",
    "Dropout",
    "FeedForward",
    "LayerNorm",
    "MoE",
    "PositionEmbedding",
    "RMSNorm",
    "SelfAttention",
    "TensorRegion",
    "TokenCrossEntropy",
    "TokenEmbedding",
    "in_stream",
    "rotate",
    "sharded_cross_entropy",
    "stream_positions",
]
