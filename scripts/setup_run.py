"""From options to a strategy, data and a model."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import tensorflow as tf
import tqdm

from llmos_tf import devices
from llmos_tf.checkpoint import latest_checkpoint, load_config
from llmos_tf.config import ModelConfig
from llmos_tf.data import TextData
from llmos_tf.files.locking import claimed
from llmos_tf.files.reading import parse_json
from llmos_tf.models import GPT, Llama, Mixtral, get_preset
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.scripts.options import RunOptions
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training.evaluation import HeldOutLoss, evaluate
from llmos_tf.training.reporting import bar_interval, read_metrics

_MODELS: tuple[type[LanguageModel], ...] = (GPT, Llama, Mixtral)


def make_strategy(options: RunOptions) -> MeshStrategy:
    """Makes the devices and the strategy of a run.

    On a machine without GPUs it first splits the CPU into as many devices as the mesh needs.

    Args:
        options: of the run.

    Returns:
        The strategy.

    Raises:
        ValueError: the mesh does not fit the devices or the options.
    """  # noqa: DOC502
    mesh = options.parsed_mesh
    wanted = options.virtual_devices
    if wanted is None and not tf.config.list_physical_devices("GPU"):
        wanted = mesh.size
    if wanted is not None:
        devices.configure_virtual_cpus(wanted)
    return MeshStrategy(
        mesh,
        zero_stage=options.zero_stage,
        sequence_parallel=options.sequence_parallel,
        num_microbatches=options.microbatches,
        schedule=options.schedule,
        num_chunks=options.num_chunks,
        context_method=options.context_method,
        gradient_compression=options.gradient_compression,
        rematerialise=options.recomputation,
        offload=options.offload,
        reshard_after_forward=options.reshard_after_forward,
    )


def make_model(config: ModelConfig, strategy: MeshStrategy, seed: int) -> LanguageModel:
    """Makes a model under a strategy.

    Args:
        config: its sizes.
        strategy: where it lives.
        seed: of its weights.

    Returns:
        The model, built.

    Raises:
        ValueError: the mesh does not divide the model.
    """  # noqa: DOC502
    kind = next(kind for kind in _MODELS if isinstance(config, kind.config_class))
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        return kind(config, name=config.architecture)


def preset_config(options: RunOptions) -> ModelConfig:
    """Returns the sizes of `--preset`.

    Args:
        options: of the run.

    Returns:
        The configuration.

    Raises:
        ValueError: an unknown preset.
    """  # noqa: DOC502
    return get_preset(options.preset)


def evaluate_with_bar(model: LanguageModel, data: TextData, batch_size: int) -> HeldOutLoss:
    """Computes the loss over the held-out text under a progress bar.

    Args:
        model: the model.
        data: its text.
        batch_size: sequences in a step, over all devices.

    Returns:
        The loss.
    """
    with tqdm.tqdm(
        desc="held-out text", unit="step", leave=False, mininterval=bar_interval()
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return evaluate(model, data.heldout, data.heldout_bytes, batch_size, progress)


def require_one_process() -> None:
    """Checks that this program was not started as one of several workers.

    Raises:
        ValueError: TF_CONFIG names more than one, or is not JSON.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    config = parse_json(text, "The environment variable TF_CONFIG") if text else {}
    cluster = config.get("cluster") if isinstance(config, dict) else None
    jobs = cluster.values() if isinstance(cluster, dict) else ()
    num_tasks = sum(len(tasks) for tasks in jobs if isinstance(tasks, list | dict))
    if num_tasks > 1:
        raise ValueError(
            f"This program runs in one process, and TF_CONFIG names {num_tasks}. Unset TF_CONFIG, "
            "and start it once, with a --mesh over the devices of one machine."
        )


def checkpoint_path(options: RunOptions) -> Path:
    """Returns the checkpoint that `--checkpoint` or `--workdir` names.

    Args:
        options: of the run.

    Returns:
        Path of the checkpoint.

    Raises:
        ValueError: neither flag is given.
        FileNotFoundError: there is no checkpoint.
    """
    given = options.checkpoint or options.workdir
    if not given:
        raise ValueError(
            "Which weights? Give --checkpoint=PATH, a checkpoint or the folder of a training run."
        )
    path = Path(given)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint {given!r}: the path does not exist.")
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (latest := latest_checkpoint(folder)) is not None:
            return latest
    return path


def checkpoint_config(path: Path) -> ModelConfig:
    """Returns the sizes of the model in a checkpoint.

    Args:
        path: the checkpoint.

    Returns:
        The configuration.

    Raises:
        ValueError: it is not a checkpoint, or holds no configuration.
    """  # noqa: DOC502
    return load_config(path)


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
            f"{options.preset}. Take at most {config.max_positions}, or a larger preset."
        )
    _check_split(options, length)
    return length


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


@contextlib.contextmanager
def claimed_workdir(options: RunOptions) -> Iterator[Path]:
    """Claims the folder where results go: a new one in llmos_runs/ where none is named.

    Args:
        options: of the run.

    Yields:
        The folder. It is removed at the end if nothing was written to it.

    Raises:
        ValueError: another process trains there, or the folder holds a run already, and this one
            does not resume it, or its metrics.jsonl is damaged.
    """
    workdir = Path("llmos_runs") / f"{options.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    workdir = workdir if options.workdir is None else Path(options.workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file. Name a folder, new or of an earlier run.")
    with claimed(workdir):
        latest = latest_checkpoint(workdir / "checkpoints")
        if latest is not None and not options.resume:
            raise ValueError(
                f"--workdir={workdir} holds a run already, up to {latest.name}. Add --resume to "
                "continue it, or name another folder."
            )
        if latest is None and options.resume:
            raise ValueError(
                f"--resume: there is no checkpoint in {workdir / 'checkpoints'}. Leave --resume "
                "out to start a run there, or name the folder of the run to continue."
            )
        if options.resume and (metrics := workdir / "metrics.jsonl").exists():
            # Found damaged now, and not after the model is built.
            read_metrics(metrics)
        yield workdir
