"""Weights of blocks: gathered while the block before computes, let go, gathered again."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from llmos_tf import Mesh, collectives, devices
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training import make_train_step
from llmos_tf.wire import sending


def on(reshard=True, options=None, **axes):
    mesh = Mesh(**axes, devices=devices.visible_devices()[: Mesh(**axes).size])
    return MeshStrategy(mesh, reshard_after_forward=reshard, **(options or {}))


class Slow(layers.Layer):
    """A block of two kernels; on rank 1 each of its passes takes a while between them.

    On one rank only, as a sleeping op holds one of TensorFlow's threads, of which there may be two.
    """

    def __init__(self, width, events):
        super().__init__()
        self.up, self.down = (layers.Dense(size, use_bias=False) for size in (width, 8))
        self.width = width
        # Keras would keep a copy of a list.
        self.note = events.append

    def build(self, shape):
        self.up.build(shape)
        self.down.build((*shape[:-1], self.width))

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        @tf.custom_gradient
        def slow(x):
            return self.wait(x, "forward"), lambda dy: self.wait(dy, "backward")

        return self.down(slow(self.up(x)))

    def wait(self, x, what):
        def wait(x, rank):
            if rank == 1:
                time.sleep(0.3)
                self.note((what, self.width))
            return x

        rank = collectives.axis_index("fsdp")
        y = tf.numpy_function(wait, [x, rank], x.dtype, stateful=False)
        return tf.ensure_shape(y, x.shape)


WIDTHS = (16, 24, 32, 40)


def executed(monkeypatch, reshard, options=None, **axes):
    """The order in which a step's passes through blocks end, and their gathers."""
    events, original = [], tf.raw_ops.CollectiveGatherV2
    elements = {8 * width: width for width in WIDTHS}

    def observed(**arguments):
        y = original(**arguments)
        size = 2 * arguments["input"].shape.num_elements()
        if size not in elements:
            return y

        def note(first, rank):
            if rank == 1:
                events.append(("gather", elements[size]))
            return first

        rank = collectives.axis_index("fsdp")
        first = tf.numpy_function(note, [y[0], rank], y.dtype, stateful=False)
        return tf.concat([tf.ensure_shape(first, [])[tf.newaxis], y[1:]], 0)

    monkeypatch.setattr(tf.raw_ops, "CollectiveGatherV2", observed)
    strategy = on(reshard, options, **axes)
    with strategy.scope():
        model = keras.Sequential([layers.Dense(8), *(Slow(width, events) for width in WIDTHS)])
        model.build([4, 8])
        step = make_train_step(model, keras.optimizers.SGD(), "mse")
    x = np.ones((4, 8), "float32")
    # As between devices that share no memory.
    with sending(strategy):
        step(x, x)
        events.clear()
        step(x, x)
    return events


def by_passes(events):
    """For each pass through a block, what was gathered since the one before, and the pass."""
    found, gathered = [], []
    for event in events:
        what, width = event
        if what == "gather":
            gathered.append(width)
        else:
            found.append((sorted(gathered), event))
            gathered = []
    return found


@pytest.mark.parametrize("reshard", [False, True])
def test_the_next_block_is_gathered_while_this_one_computes(monkeypatch, reshard):
    """Fails if all gathers start with the step, if one waits until the block before is through, or
    if the backward pass gathers late: after what is sent of the gradients of the block after."""
    events = executed(monkeypatch, reshard, fsdp=2)
    # What has come by the end of a pass that had not by the end of the one before: the block's own
    # weights and those of the next, then one block's more each time.
    turns = [[16, 16, 24, 24], [32, 32], [40, 40], []]
    expected = [*zip(turns, [("forward", width) for width in WIDTHS], strict=True)]
    turns = [[32, 32, 40, 40], [24, 24], [16, 16], []] if reshard else [[]] * 4
    expected += zip(turns, [("backward", width) for width in WIDTHS[::-1]], strict=True)
    assert by_passes(events) == expected
