"""From flags to the options of training, evaluation and generation. No TensorFlow.

A run that begins has the values of the flags. One that reads a checkpoint takes what the checkpoint
records, and refuses flags that contradict it.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmos_tf.checkpoint import latest_checkpoint
from llmos_tf.config import ModelConfig
from llmos_tf.mesh import Mesh
from llmos_tf.models.presets import get_preset
from llmos_tf.scripts import flags
from llmos_tf.scripts.options import GenerateOptions, RunOptions
from llmos_tf.scripts.recorded import BYTES, Record, checkpoint_of

RUNS = Path("llmos_runs")
_FIELDS = tuple(RunOptions.__dataclass_fields__)
# Settings without which a resumed run is not the one that was interrupted.
_OF_THE_RUN = ("preset", "data", "seq_len", "global_batch", "seed")
_DEFAULT_STEPS = 900


def train_options() -> RunOptions | None:
    """Returns the options of llmos-train.

    Returns:
        The options, checked; None for a run that is resumed and has nothing left to train, which is
        then printed.

    Raises:
        ValueError: flags that do not go together, or contradict the checkpoint.
        FileNotFoundError: there is no run to resume.
    """  # noqa: DOC502
    values = _values()
    if not values["resume"]:
        config = get_preset(values["preset"])
        workdir = _new_workdir(values["workdir"], values["preset"])
        return _with_length(RunOptions(**values | {"workdir": str(workdir)}), config)
    workdir = _workdir_to_resume(values["workdir"])
    record = Record.read(latest_checkpoint(workdir / "checkpoints"))
    given = flags.given(_FIELDS)
    record.refuse_contradictions(given, _OF_THE_RUN)
    values = record.values(values, given) | {"workdir": str(workdir)}
    options = _with_length(RunOptions(**values), record.config)
    if record.step < options.steps or not (workdir / "summary.json").exists():
        changes = record.changes(options)
        print(f"Resuming {record.path}{', with changed settings: ' if changes else ''}{changes}")
        return options
    print(
        f"Nothing is left to train in {workdir}: {record.path.name} has done all {options.steps} "
        f"steps. Add --steps=N with N above {record.step} to train further.\n"
        f"For the result: llmos-evaluate --checkpoint={workdir}"
    )
    return None


def evaluate_options() -> RunOptions:
    """Returns the options of llmos-evaluate.

    Returns:
        The options, checked; `checkpoint` is the checkpoint itself.

    Raises:
        ValueError: flags that do not go together, or contradict the checkpoint.
        FileNotFoundError: there is no checkpoint.
    """  # noqa: DOC502
    given = flags.given(_FIELDS)
    record, values = _of_checkpoint(given)
    record.refuse_contradictions(given, ("seq_len",))
    _require_text(record, given)
    options = _with_batch(values, given)
    return _with_length(options, record.config)


def generate_options() -> GenerateOptions:
    """Returns the options of llmos-generate.

    Returns:
        The options, checked; `run.checkpoint` is the checkpoint itself.

    Raises:
        ValueError: flags that do not go together, or contradict the checkpoint.
        FileNotFoundError: there is no checkpoint.
    """  # noqa: DOC502
    given = flags.given(_FIELDS)
    _, values = _of_checkpoint(given)
    names = [name for name in GenerateOptions.__dataclass_fields__ if name != "run"]
    # A continuation is drawn with a seed of its own.
    values["seed"] = flags.FLAGS.seed
    return GenerateOptions(run=_with_batch(values, given), **flags.read(names))


def sequence_length(options: RunOptions, config: ModelConfig) -> int:
    """Returns the tokens of a sequence, checked against model and mesh.

    Args:
        options: of the run.
        config: the model's sizes.

    Returns:
        `--seq_len`, or the model's positions.

    Raises:
        ValueError: longer than the model's positions, or not divisible where positions are split.
    """
    length = options.seq_len or config.max_positions
    if length > config.max_positions:
        raise ValueError(
            f"--seq_len={length} is more than the {config.max_positions} positions of "
            f"{options.preset}. Take at most {config.max_positions}, or a preset with more."
        )
    if options.mesh is not None:
        _check_split(options, length)
    return length


def _values() -> dict[str, Any]:
    """The values of all flags of a run, of which some stand for others."""
    values = flags.read(_FIELDS)
    if values["mesh"] is not None:
        # The last one counts, as of any flag.
        values["mesh"] = values["mesh"][-1]
    if values["steps"] is None:
        values["steps"] = _DEFAULT_STEPS
    if values["tokenizer"] == BYTES:
        values["tokenizer"] = None
    return values


def _of_checkpoint(given: Mapping[str, Any]) -> tuple[Record, dict[str, Any]]:
    """The record of the checkpoint that is read, and the options that follow from it."""
    values = _values()
    if values["checkpoint"] and values["workdir"]:
        raise ValueError(
            "--workdir is the same as --checkpoint. Received: "
            f"--checkpoint={values['checkpoint']} --workdir={values['workdir']}. Give one of them."
        )
    record = Record.read(checkpoint_of(values["checkpoint"] or values["workdir"]))
    return record, record.values(values, given) | {"checkpoint": str(record.path)}


def _require_text(record: Record, given: Mapping[str, Any]) -> None:
    """Finds a checkpoint of which it is not known what to evaluate it on."""
    if record.text is None and "data" not in given:
        raise ValueError(
            f"The checkpoint {record.path} does not record its text: llmos-train has not written "
            "it. Give --data=stdlib, or a glob of text or .jsonl files."
        )


def _with_batch(values: dict[str, Any], given: Mapping[str, Any]) -> RunOptions:
    """Options whose batch the mesh can split: without gradients it changes no result."""
    if "global_batch" in given or values["mesh"] is None:
        return RunOptions(**values)
    mesh = Mesh.from_string(values["mesh"])
    parts = mesh.batch_ways * (values["microbatches"] or mesh.axis_size("pipe"))
    return RunOptions(**values | {"global_batch": -(-values["global_batch"] // parts) * parts})


def _with_length(options: RunOptions, config: ModelConfig) -> RunOptions:
    return replace(options, seq_len=sequence_length(options, config))


def _check_split(options: RunOptions, length: int) -> None:
    """Finds positions that the axes which split them do not divide."""
    mesh, ways, of = options.parsed_mesh, 1, []
    if mesh.axis_size("context") > 1:
        # The ring balances causal attention: each rank has an early and a late piece.
        pieces = 2 if options.context_method == "ring" else 1
        ways *= pieces * mesh.axis_size("context")
        of.append(f"{'2 × ' * (pieces > 1)}context={mesh.axis_size('context')}")
    if options.sequence_parallel:
        ways *= mesh.axis_size("tensor")
        of.append(f"tensor={mesh.axis_size('tensor')}")
    if length % ways:
        raise ValueError(
            f"{length} positions are split over {' × '.join(of)}, which does not divide them. Take "
            f"a --seq_len that is a multiple of {ways}."
        )


def _new_workdir(given: str | None, preset: str) -> Path:
    """The folder of a run that begins, which holds no run yet."""
    if given is None:
        return RUNS / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    workdir = _folder(given)
    latest = latest_checkpoint(workdir / "checkpoints")
    if latest is not None:
        raise ValueError(
            f"--workdir={workdir} holds a run already, up to {latest.name}. Add --resume to "
            "continue it, or name another folder."
        )
    return workdir


def _workdir_to_resume(given: str | None) -> Path:
    """The folder of the run to resume: the one that is given, or that of the newest checkpoint."""
    if given is not None:
        workdir = _folder(given)
        if latest_checkpoint(workdir / "checkpoints") is None:
            raise ValueError(
                f"--resume: there is no checkpoint in {workdir / 'checkpoints'}. Leave --resume "
                "out to start a run there, or name the folder of the run to continue."
            )
        return workdir
    states = [
        latest / "state.json"
        for folder in RUNS.glob("*/checkpoints")
        if (latest := latest_checkpoint(folder)) is not None
    ]
    if not states:
        raise ValueError(
            f"--resume continues the newest run in {RUNS}/, and there is none. Give the folder of "
            "the run: --workdir=PATH."
        )
    newest = max(states, key=lambda state: state.stat().st_mtime)
    return newest.parent.parent.parent


def _folder(given: str) -> Path:
    workdir = Path(given)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file. Name a folder, new or of an earlier run.")
    return workdir
