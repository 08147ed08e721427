"""One process writes files: what is saved under a strategy over several processes.

All processes run the same script, with the same `model.save`, `ModelCheckpoint` and so on, often on
one shared disk. All have to save, because each holds a part of the weights, which the others need;
but two that write one file leave neither's. So process 0 writes, and the others write the same to a
temporary folder, which is deleted. Nobody goes on before the file is complete.
"""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.coordination import Agreement

# Callbacks of Keras that write files of their own, beside those of the model.
_CALLBACKS = ("ModelCheckpoint", "BackupAndRestore", "CSVLogger", "TensorBoard")
_SAVES = (
    (_internal.saving_lib, "save_model"),
    (_internal.saving_lib, "save_weights_only"),
    (_internal.legacy_h5_format, "save_model_to_hdf5"),
)
_LOOPS = ("fit", "evaluate", "predict")


@functools.cache
def hook_files() -> None:
    """Has one process write what Keras saves, for models of a strategy with an `agreement`."""
    for module, name in _SAVES:
        setattr(module, name, _saved_by_one(getattr(module, name)))
    for name in _LOOPS:
        original = getattr(_internal.TensorFlowTrainer, name)
        setattr(_internal.TensorFlowTrainer, name, _writing_by_one(original))


def _agreement_of(model: Any) -> Agreement | None:
    return getattr(getattr(model, "distribute_strategy", None), "agreement", None)


def _saved_by_one(original: Callable) -> Callable:
    @functools.wraps(original)
    def save(model, filepath, *args, **kwargs):
        agreement = _agreement_of(model)
        if agreement is None or not isinstance(filepath, str | os.PathLike):
            # What is no path is memory of this process.
            return original(model, filepath, *args, **kwargs)
        # First all arrive here: a script may look whether the file is there before it saves.
        agreement.from_all("")
        problem = agreement.from_chief(_obstacle(str(filepath)) if agreement.is_chief else "")
        if problem:
            # Before anybody reads weights, for which the others would wait.
            raise OSError(f"Process 0 cannot save to {filepath}: {problem}.")
        if agreement.is_chief:
            return _as_chief(agreement, lambda: original(model, filepath, *args, **kwargs))
        with tempfile.TemporaryDirectory() as folder:
            own = os.path.join(folder, Path(filepath).name)
            result = original(model, own, *args, **kwargs)
        problem = agreement.from_chief("")
        if problem:
            raise OSError(f"Process 0 could not save to {filepath}: {problem}.")
        return result

    return save


def _obstacle(filepath: str) -> str:
    """Why a file cannot be written, or nothing: as far as can be seen before it is."""
    if "://" in filepath or not filepath.endswith((".keras", ".h5", ".hdf5", ".json")):
        return ""
    folder = os.path.dirname(os.path.abspath(filepath))
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    target = filepath if os.path.exists(filepath) else folder
    return "" if os.access(target, os.W_OK) else f"{target} is not to be written"


def _as_chief(agreement: Agreement, save: Callable[[], Any]) -> Any:
    """Saves, and tells the others that it is done, or what went wrong."""
    try:
        result = save()
    except Exception as error:
        agreement.from_chief(f"{type(error).__name__}: {error}")
        raise
    agreement.from_chief("")
    return result


def _writing_by_one(original: Callable) -> Callable:
    @functools.wraps(original)
    def loop(model, *args, **kwargs):
        agreement = _agreement_of(model)
        if agreement is None or agreement.is_chief:
            return original(model, *args, **kwargs)
        with tempfile.TemporaryDirectory() as folder, _callbacks_write_to(folder):
            return original(model, *args, **kwargs)

    return loop


@contextlib.contextmanager
def _callbacks_write_to(folder: str) -> Iterator[None]:
    """Keras's callbacks write no files but summaries, and those to `folder`."""
    modules = {sys.modules[getattr(keras.callbacks, name).__module__] for name in _CALLBACKS}
    with _internal.patched(
        {
            **{(module, "file_utils"): _ReadOnlyFiles for module in modules},
            # Written all the same: a histogram reads the weights, which all processes do together.
            (tf.summary, "create_file_writer"): lambda original: _elsewhere(original, folder),
        }
    ):
        yield


def _elsewhere(original: Callable, folder: str) -> Callable:
    @functools.wraps(original)
    def create_file_writer(logdir, *args, **kwargs):
        del logdir
        return original(folder, *args, **kwargs)

    return create_file_writer


class _ReadOnlyFiles:
    """Keras's module of file functions, of which those that write do nothing."""

    def __init__(self, functions: Any):
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def File(self, path: str, mode: str = "r") -> Any:
        if mode.startswith("r"):
            return self._functions.File(path, mode)
        return self._functions.File(os.devnull, mode)

    def makedirs(self, path: str) -> None:
        del path

    def remove(self, path: str) -> None:
        del path

    def rmtree(self, path: str) -> None:
        del path

    def copy(self, source: str, target: str) -> None:
        del source, target
