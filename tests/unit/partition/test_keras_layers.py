"""Stock Keras layers, with their gradients: no op of them is computed whole."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from lanes import usual
from partitioning.harness import Partitioned

from llmos_tf.partition.graph.placements import Sharded

L = keras.layers
_IMAGES, _POSITIONS, _VOLUMES, _TOKENS = (8, 8, 3), (6, 4), (4, 4, 4, 2), (5,)
LAYERS = {
    "conv_2d": (lambda: L.Conv2D(4, 3, strides=2), _IMAGES),
    "conv_2d_groups": (lambda: L.Conv2D(6, 3, groups=3), _IMAGES),
    "conv_2d_transpose": (lambda: L.Conv2DTranspose(4, 3), _IMAGES),
    "separable": (lambda: L.SeparableConv2D(4, 3), _IMAGES),
    "depthwise": (lambda: L.DepthwiseConv2D(3), _IMAGES),
    "conv_1d": (lambda: L.Conv1D(4, 3, padding="causal"), _POSITIONS),
    "conv_3d": (lambda: L.Conv3D(4, 2), _VOLUMES),
    "max_pooling": (lambda: L.MaxPooling2D(2), _IMAGES),
    "average_pooling": (lambda: L.AveragePooling2D(2, padding="same"), _IMAGES),
    "adaptive_pooling": (lambda: L.AdaptiveMaxPooling2D(2), _IMAGES),
    "global_pooling": (lambda: L.GlobalAveragePooling2D(), _IMAGES),
    "batch_normalization": (lambda: L.BatchNormalization(), _IMAGES),
    "group_normalization": (lambda: L.GroupNormalization(3), _IMAGES),
    "layer_normalization": (lambda: L.LayerNormalization(), _POSITIONS),
    "rms_normalization": (lambda: L.RMSNormalization(), _POSITIONS),
    "unit_normalization": (lambda: L.UnitNormalization(), _POSITIONS),
    "attention": (lambda: SelfAttention(L.MultiHeadAttention(2, 4, dropout=0.1)), _POSITIONS),
    "embedding": (lambda: L.Embedding(10, 4), _TOKENS),
    "silu": (lambda: L.Activation("silu"), _POSITIONS),
    "prelu": (lambda: L.PReLU(), _POSITIONS),
    "dropout": (lambda: L.Dropout(0.2), _POSITIONS),
    "gaussian_noise": (lambda: L.GaussianNoise(0.2), _POSITIONS),
    "up_sampling": (lambda: L.UpSampling2D(interpolation="bilinear"), _IMAGES),
    "resizing": (lambda: L.Resizing(4, 4), _IMAGES),
    "random_flip": (lambda: L.RandomFlip(), _IMAGES),
    "random_rotation": (lambda: L.RandomRotation(0.1), _IMAGES),
    "random_hue": (lambda: L.RandomHue(0.1), _IMAGES),
    "random_erasing": (lambda: L.RandomErasing(), _IMAGES),
    "discretization": (lambda: L.Discretization([0.0, 1.0], output_mode="one_hot"), (1,)),
    "hashing": (lambda: L.Hashing(5), _TOKENS),
}


class SelfAttention(keras.layers.Layer):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def call(self, x, training=None):
        return self.attention(x, x, use_causal_mask=True, training=training)


@pytest.mark.parametrize("name", usual(LAYERS, "conv_2d", "attention", "silu", "random_rotation"))
def test_a_layer_has_rules(name):
    # Fails if rows are gathered for a layer that works row by row, or only adds up over rows.
    make, shape = LAYERS[name]
    layer = make()
    rows = np.ones([12, *shape], np.int32 if shape == _TOKENS else np.float32)
    layer(rows)

    def step(x):
        y = tf.cast(layer(x, training=True), tf.float32)
        weights = [weight.value for weight in layer.trainable_variables]
        sources = weights if x.dtype.is_integer else [x, *weights]
        return y, tf.gradients(tf.reduce_mean(tf.square(y)), sources) if sources else ()

    partitioned = Partitioned(step, [rows], [True])
    assert partitioned.without_rule == []
    gathered = [c for c in partitioned.plan.changes if isinstance(c.source, Sharded)]
    assert gathered == []
