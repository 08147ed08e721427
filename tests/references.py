"""Results of one device, computed once in a run of tests and read by its other processes."""

import fcntl
import functools
import hashlib
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import keras

# Names the folder of a run; its workers inherit it.
FOLDER = "LLMOS_TF_TEST_REFERENCES"


def begin_run():
    """Makes the folder of this run of tests, for this process and those that it starts."""
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="references-")


def end_run():
    """Removes the folder."""
    shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)


def shared(function):
    """Decorates a function of results that can be pickled, such as the weights of one device.

    No model: it would keep its traced step in memory, and a pickled one is another one.

    Args:
        function: its arguments are strings, numbers or functions of a module, which with the
            floating-point type of the test are all that its result depends on.
    """
    known = {}

    @functools.wraps(function)
    def result_of(*args, **kwargs):
        named = [*args, *sorted(kwargs.items())]
        words = [getattr(value, "__qualname__", repr(value)) for value in named]
        key = "\n".join(
            (
                function.__module__,
                function.__qualname__,
                keras.config.floatx(),
                keras.config.dtype_policy().name,
                *words,
            )
        )
        if key not in known:
            known[key] = _from_file(key, functools.partial(function, *args, **kwargs))
        return known[key]

    return result_of


def build_optimizer(model):
    """Creates the state of an optimizer before one device's step is traced.

    Keras creates it while it traces, where each slot adds two branches: 1.7 times the time. On a
    mesh it is left to Keras, as in a user's script.
    """
    if model is not None and model.built and getattr(model, "optimizer", None) is not None:
        model.optimizer.build(model.trainable_variables)


def _from_file(key, compute):
    """The result that another process has stored, or a new one, which is stored for the others."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return compute()
    file = Path(folder) / hashlib.sha256(key.encode()).hexdigest()
    with file.with_suffix(".lock").open("w") as lock:
        # The others wait here instead of computing the same.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            return pickle.loads(file.read_bytes())
        result = compute()
        content = pickle.dumps(result)
        file.write_bytes(content)
        return result
