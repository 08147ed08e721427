"""Functions whose errors are those of the step: only where they run on one device."""

import pytest
import tensorflow as tf
from small_strategies import strategy_of

from llmos_tf.graph.errors import trace_for_devices
from llmos_tf.mesh import Mesh
from llmos_tf.strategies import MeshStrategy

pytestmark = pytest.mark.fast

SCALAR = tf.TensorSpec([])


def shares(concrete):
    return concrete.function_def.attr["shared_rendezvous"].b


def test_functions_on_one_device_share_the_rendezvous():
    """Fails if the error of a plain function, of one that is called by another one, or of one that
    reads variables of the mesh, may be masked."""
    strategy = strategy_of("data2")
    with strategy.scope():
        variable = tf.Variable(1.0)
    inner = trace_for_devices(lambda x: x + variable.values[0], [SCALAR], _noinline=True)
    outer = trace_for_devices(lambda x: inner(x) + tf.py_function(abs, [x], x.dtype), [SCALAR])
    assert shares(inner)
    assert shares(outer)
    assert inner.function_def.attr["_noinline"].b


@pytest.mark.parametrize("kind", ["device", "branch", "variable", "table", "argument"])
def test_functions_on_several_devices_do_not(kind):
    """Fails if a function shares names of tensors that it sends itself: two calls of it at the same
    time would take each other's."""
    variable = tf.Variable(1.0)
    keys = tf.lookup.KeyValueTensorInitializer([0], [1])
    table = tf.lookup.StaticHashTable(keys, 0)

    def on_device(x):
        with tf.device("CPU:1"):
            return x + 1

    specs, given = [SCALAR], ()
    body = {
        "device": on_device,
        "branch": lambda x: tf.cond(x > 0, lambda: on_device(x), lambda: x),
        "variable": lambda x: x + variable,
        "table": lambda x: table.lookup(tf.cast(x, tf.int32)),
        "argument": lambda x: tf.raw_ops.ReadVariableOp(resource=x, dtype=tf.float32),
    }[kind]
    if kind == "argument":
        specs, given = [tf.TensorSpec([], tf.resource)], [variable.handle]
    assert not shares(trace_for_devices(body, specs, given))


def test_offloaded_state_is_on_another_device():
    """Fails if a variable of the mesh that lies on the host counts as one of its device."""
    strategy = MeshStrategy(Mesh(data=2), offload="parameters")
    with strategy.scope():
        variable = tf.Variable(1.0)
    function = trace_for_devices(lambda x: x + variable.values[1], [SCALAR])
    assert not shares(function)
