"""Writing a checkpoint."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from llmos_tf.checkpoint.contents import Contents, training_contents
from llmos_tf.checkpoint.folders import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    appearing,
    remove_older,
    step_name,
    writing_alone,
)
from llmos_tf.checkpoint.manifest import Manifest, write_manifest
from llmos_tf.checkpoint.processes import agreement_of, together
from llmos_tf.checkpoint.tensor_files import check_dtypes, file_order, write_tensors


def save_checkpoint(
    directory: str | Path,
    model: keras.Model,
    *,
    step: int,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = 2,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> Path:
    """Writes ``directory/step-{step:08d}``: model, optimizer, and what the caller adds.

    It returns when everything is on disk. If it is interrupted, there is no new checkpoint and the
    older ones are as they were. A checkpoint of the same step is replaced. Training waits, and the
    host holds one full variable at a time. Two processes that save to one folder take turns.

    Under `MultiWorkerMeshStrategy` all processes call it. Process 0 writes, and what fails in one
    of them is an error in all.

    Args:
        directory: folder of a run's checkpoints, of no other use; created if missing.
        model: a built Keras model, created under any strategy or none.
        step: number of steps done, at least 0.
        extra: values that JSON can hold, such as the data iterator's state; tuples come back as
            lists, and all keys as strings. Of several processes, that of process 0 is stored.
        keep: how many checkpoints stay, this one and those of the highest steps; None for all.
        optimizer: for a custom loop around a model that is not compiled; None takes that of
            `model.compile`. One without state yet gets its state.

    Returns:
        Path of the checkpoint.

    Raises:
        ValueError: an argument out of its range, a model without weights, or a value that a
            checkpoint cannot hold. Nothing is written.
        FolderInUseError: another process was saving to the folder for ten minutes.
        OSError: a file cannot be written, as on a full disk; the error names it.

    Example:
        >>> save_checkpoint("run", model, step=120, extra={"batches": batches.state()})
        PosixPath('run/step-00000120')
    """  # noqa: DOC502
    step = _checked_integer("step", step, 0)
    final = Path(directory) / step_name(step)
    keep = None if keep is None else _checked_integer("keep", keep, 1)
    extra = _checked_extra(extra)
    contents = training_contents(model, optimizer)
    check_dtypes(contents.model_variables | contents.optimizer_variables)
    agreement = agreement_of(model)
    if agreement is None:
        _write(final, step, extra, keep, contents)
        return final
    agreement.require_same("step of save_checkpoint", str(step))
    contents = _read_once(contents)

    def write_or_gather() -> None:
        try:
            if agreement.is_chief:
                _write(final, step, extra, keep, contents)
        finally:
            # Also after an error: the other processes wait for this one in each gather.
            for variable in _in_file_order(contents):
                variable.gather()

    together(agreement, write_or_gather)
    return final


def _write(
    final: Path, step: int, extra: dict[str, Any], keep: int | None, contents: Contents
) -> None:
    """Writes the files of a checkpoint, and removes older ones."""
    for path in (final.parent, final):
        if path.exists() and not path.is_dir():
            raise ValueError(f"Checkpoints go to a folder. Received: the file {str(path)!r}.")
    with writing_alone(final.parent):
        with appearing(final) as folder:
            model_records = write_tensors(folder / MODEL_FILE, contents.model_variables)
            optimizer_records = []
            if contents.optimizer is not None:
                path = folder / OPTIMIZER_FILE
                optimizer_records = write_tensors(path, contents.optimizer_variables)
            manifest = Manifest(
                step=step,
                config=contents.config,
                optimizer=contents.optimizer,
                extra=extra,
                model_variables=model_records,
                optimizer_variables=optimizer_records,
            )
            write_manifest(folder, manifest)
        remove_older(final.parent, final, keep)


class _ReadOnce:
    """A variable of several processes, all of which take part when its full value is gathered.

    Args:
        variable: the variable.
    """

    def __init__(self, variable: keras.Variable):
        self.shape, self.dtype = variable.shape, variable.dtype
        self._variable = variable
        self._is_gathered = False

    def numpy(self) -> np.ndarray:
        self._is_gathered = True
        return self._variable.numpy()

    def gather(self) -> None:
        """Takes part in the gather, if this process has not yet."""
        if not self._is_gathered:
            self.numpy()


def _read_once(contents: Contents) -> Contents:
    names = ("model_variables", "optimizer_variables")
    once = {name: {k: _ReadOnce(v) for k, v in getattr(contents, name).items()} for name in names}
    return dataclasses.replace(contents, **once)


def _in_file_order(contents: Contents) -> Iterator[_ReadOnce]:
    """The variables in the order in which `_write` reads them."""
    for variables in (contents.model_variables, contents.optimizer_variables):
        for name in file_order(variables):
            yield variables[name]


def _checked_integer(name: str, value: Any, least: int) -> int:
    # bool is an int in Python, and step True is a mistake.
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"`{name}` is an integer of at least {least}. Received: {value!r}.")
    return int(value)


def _checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """What JSON makes of `extra`, before the first file is written."""
    if extra is not None and not isinstance(extra, Mapping):
        raise ValueError(f"`extra` is a dictionary. Received: {extra!r}.")
    try:
        return json.loads(json.dumps(dict(extra or {})))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"`extra` holds what JSON can: numbers, strings, lists, dictionaries. {error}."
        ) from error
