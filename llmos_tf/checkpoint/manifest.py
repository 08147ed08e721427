"""What a checkpoint says of itself: `state.json`."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmos_tf.checkpoint.folders import STATE_FILE, latest_checkpoint
from llmos_tf.checkpoint.records import TensorRecord
from llmos_tf.config import ModelConfig

_FORMAT = "llmos_tf checkpoint"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `state.json`.

    Args:
        step: number of the step after which it was written.
        config: the model's configuration as its `to_dict` gives it, or None where it has none.
        optimizer: the optimizer's class, or None where there was no optimizer.
        extra: what the caller added.
        model_variables: what `model.safetensors` holds.
        optimizer_variables: what `optimizer.safetensors` holds.
    """

    step: int
    config: dict[str, Any] | None
    optimizer: str | None
    extra: dict[str, Any]
    model_variables: list[TensorRecord]
    optimizer_variables: list[TensorRecord]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `state.json`, and waits until it is on disk.

    Args:
        folder: of the checkpoint.
        manifest: its content.
    """
    content = {"format": _FORMAT, "format_version": _VERSION, **asdict(manifest)}
    for key in ("model_variables", "optimizer_variables"):
        content[key] = [record._asdict() for record in getattr(manifest, key)]
    with (folder / STATE_FILE).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(path: str | Path) -> Manifest:
    """Reads `state.json`.

    Args:
        path: a checkpoint.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: what is there is not a checkpoint, or one that this version cannot read.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}: the path does not exist.")
    if not (folder / STATE_FILE).is_file():
        raise ValueError(_no_checkpoint(folder))
    file = folder / STATE_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_unreadable(file)} It is not JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{_unreadable(file)} It does not say format={_FORMAT!r}.")
    if content.get("format_version") != _VERSION:
        raise ValueError(
            f"The checkpoint {folder} has format_version={content.get('format_version')!r}; this "
            f"version of llmos_tf reads {_VERSION}. Use the version that wrote it."
        )
    try:
        return _from_json(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{_unreadable(file)} A field is missing or wrong: {error}.") from error


def load_config(path: str | Path) -> ModelConfig:
    """Returns the configuration of the model in a checkpoint, to make a model like it.

    Args:
        path: a checkpoint.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: what is there is not a checkpoint, or its model had no configuration.

    Example:
        >>> model = GPT(load_config("run/step-00000120"))
    """  # noqa: DOC502
    return _model_config(path, read_manifest(path).config)


def _model_config(path: str | Path, config: dict[str, Any] | None) -> ModelConfig:
    if config is None:
        raise ValueError(
            f"The checkpoint {path} holds no configuration: its model was not one of "
            "llmos_tf.models. Make the model with the code that made it, and give it to "
            "restore_checkpoint."
        )
    return ModelConfig.from_dict(config)


def _no_checkpoint(folder: Path) -> str:
    latest = latest_checkpoint(folder)
    hint = (
        f"It holds checkpoints, though; the latest is {latest}."
        if latest is not None
        else "Give the path of a folder that save_checkpoint has written, such as step-00000120."
    )
    return f"{str(folder)!r} is not a checkpoint: it has no {STATE_FILE}. {hint}"


def _unreadable(file: Path) -> str:
    return f"The file {file} is damaged or not a checkpoint's; take another checkpoint."


def _from_json(content: dict[str, Any]) -> Manifest:
    records = {
        key: [
            TensorRecord(
                record["name"], tuple(record["shape"]), record["dtype"], int(record["crc32"])
            )
            for record in content[key]
        ]
        for key in ("model_variables", "optimizer_variables")
    }
    return Manifest(
        step=int(content["step"]),
        config=content["config"] if content["config"] is None else dict(content["config"]),
        optimizer=content["optimizer"],
        extra=dict(content["extra"]),
        **records,
    )
