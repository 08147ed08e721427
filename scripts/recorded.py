"""What a checkpoint of llmos-train records of its run: settings, text and tokenizer. No TensorFlow.

The programs that read a checkpoint take its settings from here, and compare flags with them.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_tf.checkpoint import latest_checkpoint, load_config
from llmos_tf.checkpoint.manifest import read_manifest
from llmos_tf.config import ModelConfig
from llmos_tf.data import TextData
from llmos_tf.scripts.options import OF_THE_MESH, RunOptions

# Settings that belong to one call of a program, and not to the run.
_OF_A_CALL = ("workdir", "checkpoint", "resume", "json")
# Copy of the tokenizer in the folder of a run.
TOKENIZER_FILE = "tokenizer.json"
BYTES = "bytes"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a checkpoint records.

    Args:
        path: of the checkpoint.
        step: after which it was written.
        config: the model's configuration.
        settings: flag to value, or None where llmos-train has not written it.
        text: as of `describe_text`, or None.
    """

    path: Path
    step: int
    config: ModelConfig
    settings: Mapping[str, Any] | None
    text: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Reads the record of a checkpoint.

        Args:
            path: the checkpoint.

        Returns:
            The record.

        Raises:
            FileNotFoundError: there is nothing at the path.
            ValueError: it is not a checkpoint of one of the project's models.
        """  # noqa: DOC502
        manifest = read_manifest(path)
        return cls(
            path=path,
            step=manifest.step,
            config=load_config(path),
            settings=manifest.extra.get("options"),
            text=manifest.extra.get("text"),
        )

    def values(self, flags: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings of a run that takes those of the checkpoint where no flag is given.

        Args:
            flags: values of all flags of `RunOptions`.
            given: values of those flags that stand on the command line.

        Returns:
            Field of `RunOptions` to value.
        """
        taken = {
            name: value
            for name, value in (self.settings or {}).items()
            if name in flags and name not in given and name not in _OF_A_CALL
        }
        if "mesh" in given:
            taken = {name: value for name, value in taken.items() if name not in OF_THE_MESH}
        return {**flags, **taken, "tokenizer": self.tokenizer(given.get("tokenizer"))}

    def refuse_contradictions(self, given: Mapping[str, Any], names: Iterable[str]) -> None:
        """Finds flags that contradict the checkpoint.

        Args:
            given: values of the flags that stand on the command line.
            names: of the flags that must be as in the checkpoint.

        Raises:
            ValueError: one of them is not.
        """
        recorded = self.settings or {}
        different = [
            name
            for name in names
            if name in given and name in recorded and absolute(name, given[name]) != recorded[name]
        ]
        if different:
            theirs = " ".join(f"--{name}={recorded[name]}" for name in different)
            ours = " ".join(f"--{name}={given[name]}" for name in different)
            raise ValueError(
                f"The checkpoint {self.path} is of a run with {theirs}. Received: {ours}. Leave "
                f"{'the flag' if len(different) == 1 else 'these flags'} out to take what the "
                "checkpoint records."
            )

    def changes(self, options: RunOptions) -> str:
        """Returns the settings of a run that are not as in the checkpoint.

        Args:
            options: of the run.

        Returns:
            Such as "--steps=20 (was 10)", with commas between them.
        """
        recorded = self.settings or {}
        return ", ".join(
            f"--{name}={value} (was {recorded[name]})"
            for name, value in options.to_dict().items()
            if name in recorded
            and name not in (*_OF_A_CALL, "tokenizer")
            and absolute(name, value) != recorded[name]
        )

    def tokenizer(self, given: str | None) -> str | None:
        """Returns the tokenizer of the run, wherever its file is now.

        Args:
            given: value of --tokenizer, or None where it is not given.

        Returns:
            Path of a file with the recorded content, or None for bytes.

        Raises:
            FileNotFoundError: the tokenizer is found nowhere.
            ValueError: another one is given, or none is recorded and none is given.
        """
        if self.text is None:
            if given is None:
                raise ValueError(
                    f"The checkpoint {self.path} does not record its tokenizer: llmos-train has "
                    f"not written it. Give --tokenizer=PATH of a tokenizer.json, or "
                    f"--tokenizer={BYTES}."
                )
            return None if given == BYTES else given
        recorded = self.text["tokenizer"]
        if given is not None:
            if hash_of(None if given == BYTES else given) != recorded["sha256"]:
                raise ValueError(
                    f"The checkpoint {self.path} is of a run with --tokenizer={recorded['path']}. "
                    f"Received: --tokenizer={given}, which has another content. Leave the flag "
                    "out to take what the checkpoint records."
                )
            return None if given == BYTES else given
        if recorded["sha256"] is None:
            return None
        places = [self.path.absolute().parent.parent / TOKENIZER_FILE, Path(recorded["path"])]
        for place in places:
            if place.is_file() and hash_of(place) == recorded["sha256"]:
                return str(place)
        raise FileNotFoundError(
            f"The tokenizer of the checkpoint {self.path} is neither {places[0]} nor {places[1]}, "
            f"or these files have changed (SHA-256 {recorded['sha256'][:12]}... is needed). Give "
            "its file by --tokenizer."
        )


def to_record(options: RunOptions, data: TextData) -> dict[str, Any]:
    """Returns what `Record.read` reads back, to be stored in a checkpoint.

    Args:
        options: of the run.
        data: its text.

    Returns:
        Keys and values for the `extra` of a checkpoint.
    """
    values = options.to_dict()
    return {
        "options": {name: absolute(name, value) for name, value in values.items()},
        "text": describe_text(options, data),
    }


def describe_text(options: RunOptions, data: TextData) -> dict[str, Any]:
    """Returns what tells the text of a run from another one.

    Args:
        options: of the run.
        data: its text.

    Returns:
        Plain values, for JSON.
    """
    return {
        "corpus": data.corpus_name,
        "train_tokens": data.train.num_targets,
        "heldout_bytes": data.heldout_bytes,
        "train": data.train.fingerprint,
        "heldout": data.heldout.fingerprint,
        "tokenizer": {
            "path": absolute("tokenizer", options.tokenizer),
            "sha256": hash_of(options.tokenizer),
        },
    }


def absolute(name: str, value: Any) -> Any:
    """Returns the value of a flag, independent of the current folder.

    Args:
        name: of the flag.
        value: its value.

    Returns:
        The value; a path or pattern is absolute.
    """
    if name == "tokenizer":
        return BYTES if value in (None, BYTES) else os.path.abspath(value)
    if name == "data" and value != "stdlib":
        return os.path.abspath(os.path.expanduser(value))
    return value


def hash_of(tokenizer: str | Path | None) -> str | None:
    """Returns the SHA-256 of a tokenizer's file.

    Args:
        tokenizer: its path, or None for bytes.

    Returns:
        Hexadecimal digits, or None for bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if tokenizer is None:
        return None
    if not Path(tokenizer).is_file():
        raise FileNotFoundError(
            f"There is no tokenizer file {str(tokenizer)!r}. Give the path of a Hugging Face "
            f"tokenizer.json, or --tokenizer={BYTES}."
        )
    return hashlib.sha256(Path(tokenizer).read_bytes()).hexdigest()


def checkpoint_of(given: str | None) -> Path:
    """Returns the checkpoint that `--checkpoint` or `--workdir` names.

    Args:
        given: the value of the flag.

    Returns:
        Path of the checkpoint.

    Raises:
        ValueError: no value.
        FileNotFoundError: there is no checkpoint.
    """
    if not given:
        raise ValueError(
            "The checkpoint is missing. Give --checkpoint=PATH: a checkpoint, or the folder of a "
            "training run."
        )
    path = Path(given)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {given!r}: the path does not exist.")
    return latest_checkpoint(path) or path
