"""Strategies on small meshes, what tests run on them, and a model that each of them trains."""

import functools

import keras
import numpy as np
import tensorflow as tf

from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy

TABLE = {".*/hidden/kernel": (None, "tensor")}
MESHES = {
    "one": (Mesh(), {}),
    "data2": (Mesh(data=2), {}),
    "data4": (Mesh(data=4), {"zero_stage": 1}),
    "tensor2": (Mesh(tensor=2), {"layout_map": TABLE}),
    "data2-fsdp2-tensor2": (Mesh(data=2, fsdp=2, tensor=2), {"layout_map": TABLE}),
}
# For training, which takes longer on eight devices.
MESHES_OF_4 = {"fsdp2-tensor2": (Mesh(fsdp=2, tensor=2), {"layout_map": TABLE})}


def make_model():
    keras.utils.set_random_seed(0)
    layers = [
        keras.Input((4,)),
        keras.layers.Dense(6, activation="tanh", name="hidden"),
        keras.layers.Dense(2, name="output"),
    ]
    model = keras.Sequential(layers, name="model")
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    return model


@functools.cache
def strategy_of(mesh):
    axes, options = (MESHES | MESHES_OF_4)[mesh]
    strategy = MeshStrategy(axes, **options)
    with strategy.scope():
        # Its rules have to match something, also where a test makes variables of its own only.
        make_model()
    return strategy


def local(strategy, value):
    return [np.array(v).tolist() for v in strategy.experimental_local_results(value)]


def context():
    return tf.distribute.get_replica_context()


def replica_id():
    return tf.cast(context().replica_id_in_sync_group, tf.float32)


def per_replica(strategy, function=lambda i: float(i + 1)):
    """A value for each replica: 1, 2, …"""
    return strategy.experimental_distribute_values_from_function(
        lambda c: tf.constant(function(c.replica_id_in_sync_group))
    )
