"""What memory the components of a variable have on CPU devices of one process."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from llmos_tf import devices
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

RANKS = 2


def _make(options, **axes):
    mesh = Mesh(devices=devices.visible_devices()[:RANKS], **axes)
    strategy = MeshStrategy(mesh, **options)
    with strategy.scope():
        weight = keras.Variable("uniform", shape=(8, 64), name="kernel")
        optimizer = keras.optimizers.Adam()
        optimizer.build([weight])
    (moment,) = optimizer._momentums
    return weight.value, moment.value


def _addresses(variable):
    """Where the values of components begin, in bytes."""
    views = [np.asarray(memoryview(x.read_value())) for x in variable.values]
    return [view.__array_interface__["data"][0] for view in views]


def test_components_have_memory_of_their_own():
    """Fails if devices share what each of them writes into: the first step would lay state down
    anew, in between what a step needs."""
    for variable in _make({}, data=RANKS):
        assert len(set(_addresses(variable))) == RANKS
        for component in variable.values:
            np.testing.assert_array_equal(component, tf.convert_to_tensor(variable))


def test_variables_are_made_by_one_name():
    """Fails if the name that makes a variable is its own: TensorFlow keeps a function of 38 KB for
    each. What it is called afterwards tells rank and scope."""
    made_by = []

    def noting(next_creator, **kwargs):
        made_by.append(kwargs["name"])
        return next_creator(**kwargs)

    mesh = Mesh(devices=devices.visible_devices()[:RANKS], data=RANKS)
    strategy = MeshStrategy(mesh)
    with tf.variable_creator_scope(noting), strategy.scope(), keras.name_scope("block"):
        weights = [keras.Variable("zeros", shape=(8,), name=name) for name in ("kernel", "bias")]
    assert len(made_by) == 2 * RANKS
    assert len(set(made_by)) == 1
    names = [component.name for weight in weights for component in weight.value.values]
    assert names == [
        "block/kernel:0",
        "block/kernel/rank_1:0",
        "block/bias:0",
        "block/bias/rank_1:0",
    ]
    assert [weight.value.name for weight in weights] == ["block/kernel:0", "block/bias:0"]


def test_what_is_gathered_anew_is_shared():
    """Fails if weights that ZeRO replaces in each step are laid down once for each device."""
    weight, moment = _make({"zero_stage": 1}, data=RANKS)
    assert len(set(_addresses(weight))) == 1
    assert len(set(_addresses(moment))) == RANKS


class Product(tf.Module):
    """A module of one weight, to be saved."""

    def __init__(self):
        self.weight = tf.Variable(tf.reshape(tf.range(8.0), (4, 2)))

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32)])
    def __call__(self, x):
        return x @ self.weight


@pytest.mark.parametrize("axes", [{"data": RANKS}, {"fsdp": RANKS}], ids=str)
def test_a_saved_model_is_loaded_and_trained_under_the_scope(tmp_path, axes):
    """Fails if its variables, which have no initial value, are refused, cut, or one for all ranks:
    its functions read the resource of the rank."""
    tf.saved_model.save(Product(), tmp_path)
    strategy = MeshStrategy(Mesh(devices=devices.visible_devices()[:RANKS], **axes))
    with strategy.scope():
        model = tf.saved_model.load(tmp_path)
        optimizer = keras.optimizers.SGD(1.0)
    x = tf.ones([3, 4])
    tf.debugging.assert_equal(model(x), Product()(x))

    def step():
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(model(x)) / RANKS
        optimizer.apply_gradients([(tape.gradient(total, model.weight), model.weight)])
        return model(x)

    for result in strategy.experimental_local_results(strategy.run(step)):
        tf.debugging.assert_equal(result, Product()(x) - 12)
    with strategy.scope(), pytest.raises(ValueError, match="`initial_value` arg"):
        tf.Variable(shape=(2,), dtype=tf.float32)
