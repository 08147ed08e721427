"""Writing a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from llmos_tf.checkpoint.contents import training_contents
from llmos_tf.checkpoint.folders import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    appearing,
    remove_older,
    step_name,
)
from llmos_tf.checkpoint.manifest import Manifest, write_manifest
from llmos_tf.checkpoint.tensor_files import check_dtypes, write_tensors


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
    host holds one full variable at a time.

    Args:
        directory: folder of a run's checkpoints, of no other use; made if missing.
        model: a built Keras model, made under any strategy or none.
        step: number of steps done, at least 0.
        extra: values that JSON can hold, such as the data iterator's state; tuples come back as
            lists, and all keys as strings.
        keep: how many checkpoints stay, this one and those of the highest steps; None for all.
        optimizer: for a custom loop around a model that is not compiled; None takes that of
            `model.compile`. One without state yet gets its state.

    Returns:
        Path of the checkpoint.

    Raises:
        ValueError: an argument out of its range, a model without weights, or a value that a
            checkpoint cannot hold. Nothing is written.

    Example:
        >>> save_checkpoint("run", model, step=120, extra={"batches": batches.state()})
        PosixPath('run/step-00000120')
    """
    directory = Path(directory)
    step = _checked_integer("step", step, 0)
    keep = None if keep is None else _checked_integer("keep", keep, 1)
    extra = _checked_extra(extra)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"Checkpoints go to a folder. Received: the file {str(directory)!r}.")
    contents = training_contents(model, optimizer)
    check_dtypes(contents.model_variables | contents.optimizer_variables)

    final = directory / step_name(step)
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
    remove_older(directory, final, keep)
    return final


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
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`extra` holds what JSON can: numbers, strings, lists, dictionaries. {error}."
        ) from error
