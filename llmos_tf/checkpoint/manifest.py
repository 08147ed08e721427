"""The description that a checkpoint has of itself: `state.json`."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmos_tf.checkpoint.errors import DamagedCheckpointError, quoted
from llmos_tf.checkpoint.folders import STATE_FILE, latest_checkpoint
from llmos_tf.checkpoint.records import DTYPES, TensorRecord
from llmos_tf.config import ModelConfig
from llmos_tf.files.errors import naming
from llmos_tf.files.reading import parse_json, read_bytes

_FORMAT = "llmos_tf checkpoint"
# Version 1 has no checksum; all later ones have the same.
_VERSION = 2
_CHECKSUM = "sha256"
# A record of a variable takes about 150 bytes.
_MAX_BYTES = 2**28
_REMEDY = "The file is damaged or not a checkpoint's; take another checkpoint."


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

    Raises:
        ValueError: it is larger than what `read_manifest` takes.
        OSError: it cannot be written, as on a full disk; the error names it.
    """  # noqa: DOC503
    content = {"format": _FORMAT, "format_version": _VERSION, **asdict(manifest)}
    for key in ("model_variables", "optimizer_variables"):
        content[key] = [record._asdict() for record in getattr(manifest, key)]
    text = json.dumps({_CHECKSUM: checksum(content), **content}, indent=1)
    if len(text) > _MAX_BYTES:
        raise ValueError(
            f"A checkpoint's {STATE_FILE} must have at most {_MAX_BYTES:,} bytes. Received: "
            f"{len(text):,} bytes of variables' names and `extra`."
        )
    file = folder / STATE_FILE
    with naming(file), file.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def checksum(content: dict[str, Any]) -> str:
    """Returns the checksum of the content of `state.json`.

    Args:
        content: all fields but the checksum itself.

    Returns:
        SHA-256 of its JSON with sorted keys and without white space, in hexadecimal.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: str | Path) -> Manifest:
    """Reads `state.json`.

    Args:
        path: a checkpoint.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is nothing at the path.
        DamagedCheckpointError: `state.json` is missing, or is not the one that was written.
        ValueError: a checkpoint of a version that this one cannot read.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}: the path does not exist.")
    file = folder / STATE_FILE
    try:
        content = _read_content(file)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpointError(_no_checkpoint(folder)) from None
    except RecursionError as error:
        raise DamagedCheckpointError(f"{file} is nested too deeply. {_REMEDY}") from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{error} {_REMEDY}") from error
    version = content.pop("format_version", None)
    if version not in (1, _VERSION):
        raise ValueError(
            f"The checkpoint {folder} has format_version={version!r}; this version of llmos_tf "
            f"reads 1 to {_VERSION}. Use the version that wrote it."
        )
    try:
        return _from_json(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpointError(
            f"{file}: a field is missing or wrong ({quoted(error)}). {_REMEDY}"
        ) from error


def load_config(path: str | Path) -> ModelConfig:
    """Returns the configuration of the model in a checkpoint, to create a model like it.

    Args:
        path: a checkpoint.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: there is nothing at the path.
        DamagedCheckpointError: it is not a checkpoint, or a damaged one.
        ValueError: its model has no configuration, or one that this version does not know.

    Example:
        >>> model = GPT(load_config("run/step-00000120"))
    """  # noqa: DOC503
    manifest = read_manifest(path)
    if manifest.config is None:
        raise ValueError(
            f"The checkpoint {path} holds no configuration: its model was not one of "
            "llmos_tf.models. Create the model with the code that created it, and give it to "
            "restore_checkpoint."
        )
    file = Path(path) / STATE_FILE
    try:
        config = ModelConfig.from_dict(manifest.config)
    except ValueError as error:
        raise ValueError(
            f"The configuration in {file} is not one of llmos_tf.models: {quoted(error)}"
        ) from error
    # Version 1 has no checksum. A damaged size would be built before the weights are compared.
    stored = sum(math.prod(record.shape) for record in manifest.model_variables)
    if config.num_parameters() > stored:
        raise DamagedCheckpointError(
            f"The configuration in {file} is of a model of {config.num_parameters():,} parameters, "
            f"and the checkpoint holds {stored:,}. {_REMEDY}"
        )
    return config


def _read_content(file: Path) -> dict[str, Any]:
    """The fields of `state.json` as they were written, without format and checksum."""
    content = parse_json(read_bytes(file, _MAX_BYTES), file)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{file} does not say format={_FORMAT!r}.")
    written = content.pop(_CHECKSUM, None)
    has_checksum = written is not None or content.get("format_version") != 1
    if has_checksum and written != checksum(content):
        raise ValueError(f"{file} does not match its checksum.")
    del content["format"]
    return content


def _no_checkpoint(folder: Path) -> str:
    latest = latest_checkpoint(folder)
    hint = (
        f"It holds checkpoints, though; the latest is {latest}."
        if latest is not None
        else "Give the path of a folder that save_checkpoint has written, such as step-00000120."
    )
    return f"{str(folder)!r} is not a checkpoint: it has no {STATE_FILE}. {hint}"


def _from_json(content: dict[str, Any]) -> Manifest:
    """The fields, checked; a checksum says no more than that they are those that were written."""
    fields = {key: content.pop(key) for key in Manifest.__dataclass_fields__}
    _require(not content, f"unknown fields {sorted(content)}")
    _require(_is_count(fields["step"]), f"step={fields['step']!r}")
    _require(isinstance(fields["extra"], dict), "extra is not an object")
    _require(isinstance(fields["config"], dict | None), "config is not an object")
    _require(isinstance(fields["optimizer"], str | None), "optimizer is not a name")
    for key in ("model_variables", "optimizer_variables"):
        fields[key] = [_record(record) for record in fields[key]]
        names = {record.name for record in fields[key]}
        _require(len(names) == len(fields[key]), f"a name is twice in {key}")
    return Manifest(**fields)


def _record(value: dict[str, Any]) -> TensorRecord:
    record = TensorRecord(**value)
    whole = (
        isinstance(record.name, str)
        and record.dtype in DTYPES
        and isinstance(record.shape, list)
        and all(map(_is_count, record.shape))
        and _is_count(record.crc32)
    )
    _require(whole, f"the record of a variable is {value}")
    return record._replace(shape=tuple(record.shape))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _require(is_right: bool, wrong: str) -> None:
    if not is_right:
        raise ValueError(wrong)
