"""From options to devices, a strategy, data and a model."""

import math
from dataclasses import replace

import keras
import tensorflow as tf
import tqdm

from llmos_tf import devices
from llmos_tf.config import ModelConfig
from llmos_tf.data import TextData, Tokenizer, load_text_data, load_tokenizer
from llmos_tf.models import GPT, PRESETS, Llama, Mixtral
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.scripts.options import RunOptions
from llmos_tf.scripts.settings import sequence_length
from llmos_tf.strategies import MeshStrategy
from llmos_tf.training.evaluation import HeldOutLoss, evaluate
from llmos_tf.training.reporting import bar_interval

_MODELS: tuple[type[LanguageModel], ...] = (GPT, Llama, Mixtral)

# Presets that a message names.
_SHOWN = 3


def with_mesh(options: RunOptions) -> RunOptions:
    """Returns options with a mesh: where none is given, over the devices of this machine.

    Args:
        options: of the run.

    Returns:
        The options, checked with their mesh.

    Raises:
        ValueError: options that do not fit the mesh.
    """  # noqa: DOC502
    if options.mesh is not None:
        return options
    gpus = len(tf.config.list_physical_devices("GPU"))
    return replace(options, mesh=f"data={gpus}" if gpus else "data=2,tensor=2")


def read_tokenizer(options: RunOptions, config: ModelConfig) -> Tokenizer:
    """Reads the tokenizer of a run.

    Args:
        options: of the run.
        config: the sizes of its model.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the file is not a tokenizer, or has more tokens than the model.
    """
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.vocab_size <= config.vocab_size:
        return tokenizer
    fitting = [name for name in PRESETS if PRESETS[name].vocab_size >= tokenizer.vocab_size]
    smallest = sorted(fitting, key=lambda name: PRESETS[name].num_parameters())[:_SHOWN]
    presets = ", ".join(f"{name} ({PRESETS[name].vocab_size:,})" for name in smallest)
    raise ValueError(
        f"The tokenizer {options.tokenizer or 'bytes'} has {tokenizer.vocab_size:,} tokens, and "
        f"the model has only {config.vocab_size:,}. For a checkpoint give the --tokenizer that it "
        "was trained with. For a new run leave --tokenizer out, which takes bytes, or take a "
        f"--preset with as many tokens, such as {presets or 'none here'}."
    )


def read_text(options: RunOptions, config: ModelConfig) -> TextData:
    """Reads the text of a run.

    Args:
        options: of the run.
        config: the sizes of its model.

    Returns:
        The packed text.

    Raises:
        FileNotFoundError: no file matches --data.
        ValueError: a file is not text, or the tokenizer does not fit the model.
    """  # noqa: DOC502
    tokenizer = read_tokenizer(options, config)
    return load_text_data(options.data, tokenizer, sequence_length(options, config))


def make_strategy(options: RunOptions) -> MeshStrategy:
    """Creates the devices and the strategy of a run.

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
    """Creates a model under a strategy.

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


def evaluate_with_bar(model: LanguageModel, data: TextData, batch_size: int) -> HeldOutLoss:
    """Computes the loss over the held-out text under a progress bar.

    Args:
        model: the model.
        data: its text.
        batch_size: sequences in a step, over all devices.

    Returns:
        The loss.
    """
    steps = math.ceil(data.heldout.num_sequences / batch_size)
    with tqdm.tqdm(
        desc="held-out text", total=steps, unit="step", leave=False, mininterval=bar_interval()
    ) as bar:
        return evaluate(
            model,
            data.heldout,
            data.heldout_bytes,
            batch_size,
            progress=lambda done, total: bar.update(done - bar.n),
        )
