"""One TensorFlow for all tests: eight virtual CPU devices, parsed flags, fresh Keras names."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
from absl import flags

from llmos_tf import devices

# Before TensorFlow starts its devices, which any tensor would do.
devices.configure_virtual_cpus(8)

# absl's test helpers refuse to work with flags that were never parsed.
flags.FLAGS(["pytest"])


def pytest_collection_finish(session):
    """Leaves what the imports have made out of every later collection of garbage."""
    del session
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Names and precision of one test do not reach the next."""
    yield
    # It collects garbage, which walks over all objects that there are.
    keras.backend.clear_session()
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    # TensorFlow never lets go of some graphs, of each test thousands of objects: after a thousand
    # tests a collection took five seconds, and a third of all the time went there. What is left
    # now stays, and is not walked over again.
    gc.freeze()


@pytest.fixture
def float64():
    """Everything in float64, where parallel and single-device sums differ by 1e-16 only."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
