"""Exported models are those of one device."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from llmos_tf import devices
from llmos_tf.mesh import Mesh
from llmos_tf.sharding import ShardedVariable
from llmos_tf.strategies import MeshStrategy
from llmos_tf.strategies.keras_patches.export import whole_variables

pytestmark = pytest.mark.fast


@pytest.fixture
def strategy():
    names = devices.visible_devices()[:4]
    return MeshStrategy(
        Mesh(fsdp=2, tensor=2, devices=names), layout_map={".*dense/kernel": (None, "tensor")}
    )


@pytest.fixture
def model(strategy):
    with strategy.scope():
        return keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])


def test_an_exported_model_has_its_whole_variables(strategy, model, tmp_path):
    """Fails if the file keeps parts or copies of them, or export under the scope makes variables
    of the mesh, or the model keeps the plain variables."""
    x = np.ones([5, 3], "float32")
    expected = model.predict(x, verbose=0)
    with strategy.scope():
        model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(loaded.serve(x), expected, atol=1e-6)
    assert sorted(tuple(v.shape) for v in loaded.variables) == [(2,), (3, 2)]
    assert all(isinstance(variable.value, ShardedVariable) for variable in model.variables)


def test_variables_come_back_after_an_error(model):
    """Fails if a model that could not be exported trains on one device from then on."""
    with pytest.raises(OSError, match="disk"), whole_variables(model):
        assert not any(isinstance(variable.value, ShardedVariable) for variable in model.variables)
        raise OSError("no space left on the disk")
    assert all(isinstance(variable.value, ShardedVariable) for variable in model.variables)


def test_a_saved_model_of_parts_is_refused(model, tmp_path):
    """Fails if tf.saved_model.save writes functions that read the whole in place of a part."""
    with pytest.raises(ValueError, match=r"model\.export"):
        tf.saved_model.save(model, str(tmp_path))
