"""Reading a checkpoint into a model, on any mesh, after everything was checked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from llmos_tf.checkpoint.contents import Contents, model_contents, training_contents
from llmos_tf.checkpoint.folders import MODEL_FILE, OPTIMIZER_FILE
from llmos_tf.checkpoint.manifest import Manifest, read_manifest
from llmos_tf.checkpoint.records import TensorRecord
from llmos_tf.checkpoint.tensor_files import read_tensors
from llmos_tf.config import ModelConfig

# Names that a message shows before it counts the others.
_SHOWN = 3


class RestoredState(NamedTuple):
    """What a checkpoint holds beside variables.

    Attributes:
        step: number of steps that were done.
        extra: what `save_checkpoint` was given.
    """

    step: int
    extra: dict[str, Any]


def restore_checkpoint(
    path: str | Path,
    model: keras.Model,
    *,
    weights_only: bool = False,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> RestoredState:
    """Gives a model, and its optimizer, the values of a checkpoint.

    The model may lie on another mesh than the one that wrote the checkpoint, or on one device.
    Configuration, names, shapes, dtypes and the files' bytes are checked before the first value is
    assigned, so that after an error the model is what it was.

    Args:
        path: a checkpoint, see `latest_checkpoint`.
        model: a built Keras model, made by the same code as the one that was saved.
        weights_only: leaves the optimizer out, for evaluation and generation.
        optimizer: for a custom loop around a model that is not compiled; None takes that of
            `model.compile`. One without state yet gets its state.

    Returns:
        The step, and what else was saved.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it is not a checkpoint, a damaged one, or one of another model or optimizer.

    Example:
        >>> state = restore_checkpoint(latest_checkpoint("run"), model)
        >>> batches.restore(state.extra["batches"])
    """  # noqa: DOC502
    path = Path(path)
    manifest = read_manifest(path)
    contents = model_contents(model)
    _check_config(path, manifest.config, contents.config)
    _check_model(path, manifest.model_variables, contents.model_variables)
    files = [(path / MODEL_FILE, manifest.model_variables, contents.model_variables)]
    if not weights_only:
        contents = training_contents(model, optimizer)
        _check_optimizer(path, manifest, contents)
        if contents.optimizer is not None:
            records = manifest.optimizer_variables
            files.append((path / OPTIMIZER_FILE, records, contents.optimizer_variables))
    for file, records, _ in files:
        # The bytes are read twice, so that they are never all in memory.
        for _ in read_tensors(file, records):
            pass
    for file, records, variables in files:
        _assign(file, records, variables)
    return RestoredState(manifest.step, manifest.extra)


def _assign(
    file: Path, records: Sequence[TensorRecord], variables: Mapping[str, keras.Variable]
) -> None:
    for name, value in read_tensors(file, records):
        # The full value stays on the host; a rank takes its part.
        with tf.device("CPU:0"):
            variables[name].assign(value)


def _check_config(path: Path, stored: dict[str, Any] | None, own: dict[str, Any] | None) -> None:
    stored, own = _up_to_date(stored or {}), own or {}
    if stored == own:
        return
    kinds = [config.get("architecture", "without configuration") for config in (stored, own)]
    if kinds[0] != kinds[1]:
        differences = [f"its architecture is {kinds[0]}, and that of this model {kinds[1]}"]
    else:
        differences = [
            f"{name} is {stored.get(name)!r} in the checkpoint and {own.get(name)!r} in this model"
            for name in dict.fromkeys([*own, *stored])
            if stored.get(name) != own.get(name)
        ]
    made = f"llmos_tf.checkpoint.load_config({str(path)!r})"
    remedy = (
        f"Make the model with the checkpoint's configuration, {made}, or take" if stored else "Take"
    )
    raise ValueError(
        f"The checkpoint {path} is of another model: {'; '.join(differences)}. {remedy} a "
        "checkpoint of this model."
    )


def _up_to_date(stored: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of fields that are newer than the checkpoint."""
    try:
        return json.loads(json.dumps(ModelConfig.from_dict(stored).to_dict()))
    except ValueError:
        # Not a configuration of this package's models; it is compared as it is.
        return stored


def _check_model(
    path: Path, records: Sequence[TensorRecord], variables: Mapping[str, keras.Variable]
) -> None:
    difference = _difference(records, variables, "model")
    if difference:
        raise ValueError(
            f"The checkpoint {path} is of another model: {difference}. Make the model with the "
            "code, sizes and dtype policy of the one that was saved, or take a checkpoint of this "
            "model."
        )


def _check_optimizer(path: Path, manifest: Manifest, contents: Contents) -> None:
    stored, own = manifest.optimizer, contents.optimizer
    if stored != own:
        difference = f"the optimizer is {stored} in the checkpoint and {own} here"
    else:
        difference = _difference(
            manifest.optimizer_variables, contents.optimizer_variables, "optimizer"
        )
    if difference:
        raise ValueError(
            f"The checkpoint {path} does not fit the model's optimizer: {difference}. Compile the "
            "model as in the run that wrote it (class, momentum, averages, accumulation, a fixed "
            "learning rate or a schedule), or restore with weights_only=True and a new optimizer."
        )


def _difference(
    records: Sequence[TensorRecord], variables: Mapping[str, keras.Variable], owner: str
) -> str | None:
    """What differs first between stored variables and those of a model or an optimizer."""
    stored = {record.name: record for record in records}
    missing = [name for name in variables if name not in stored]
    unexpected = [name for name in stored if name not in variables]
    parts = [f"it lacks the {owner}'s {_some(missing)}"] if missing else []
    parts += [f"it holds {_some(unexpected)}, which the {owner} lacks"] if unexpected else []
    if parts:
        return "; ".join(parts)
    for name, variable in variables.items():
        record = stored[name]
        shape = tuple(int(length) for length in variable.shape)
        if record.shape != shape:
            return (
                f"{name} has the shape {record.shape} in the checkpoint and {shape} in this {owner}"
            )
        if record.dtype != variable.dtype:
            return (
                f"{name} is {record.dtype} in the checkpoint and {variable.dtype} in this {owner}"
            )
    return None


def _some(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
