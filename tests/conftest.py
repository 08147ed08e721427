"""One TensorFlow for all tests: eight virtual CPU devices, parsed flags, fresh Keras names."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import lanes
import pytest
import references
import tensorflow as tf
from absl import flags
from durations import Durations
from xdist.scheduler import WorkStealingScheduling

from llmos_tf import devices
from llmos_tf._internal.tracing import gradient_registry

# Before TensorFlow starts its devices, which any tensor would do.
devices.configure_virtual_cpus(8)

# absl's test helpers refuse to work with flags that were never parsed.
flags.FLAGS(["pytest"])


def pytest_addoption(parser):
    parser.addoption(
        "--check-budgets",
        action="store_true",
        help="fail when a folder takes longer than its budget in tests/durations.py",
    )


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Durations(config), "durations")
        references.begin_run()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        references.end_run()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each worker one half of the tests in order, so that neighbours share fixtures.

    A worker that has finished takes tests from the other one.
    """
    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items):
    lanes.refuse_two_lanes(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Prints the command that runs a failing test alone."""
    report = yield
    if report.failed:
        report.sections.append(("run it alone", lanes.command_alone(item)))
    return report


def pytest_collection_finish(session):
    """Leaves what the imports have made out of every later collection of garbage."""
    del session
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _graph_optimizer(request):
    """TensorFlow's graph optimizer is off, except in nightly tests and those marked for it.

    It takes up to a third of the time of a test that trains a tiny model once, and has hidden bugs:
    the marked share runs with it in every run, and all nightly tests do.
    """
    names = ("nightly", "graph_optimizer")
    on = any(request.node.get_closest_marker(name) for name in names)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not on})


@pytest.fixture(autouse=True)
def _fresh_keras():
    """Names, precision and graphs of one test do not reach the next."""
    yield
    forget_custom_gradients()
    # Collects garbage.
    keras.backend.clear_session()
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    # What is left are caches of modules: later collections need not walk over them.
    gc.freeze()


def forget_custom_gradients():
    """Lets the garbage collector free the graphs of a test.

    `tf.custom_gradient` registers a function that refers to its graph, for ever: every `fit` of
    stock Keras leaked its traced step, 100 MB of a KerasHub backbone, and processes grew to 7 GB.
    """
    registered = gradient_registry._registry
    for name in [name for name in registered if name.startswith("CustomGradient-")]:
        del registered[name]


@pytest.fixture
def float64():
    """Everything in float64, where parallel and single-device sums differ by 1e-16 only."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
