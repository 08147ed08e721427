"""Generation with a key-value cache: one traced program for a model, however it is called.

Shape suffixes: B rows, T tokens of the prompt, N new tokens, V vocabulary.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from llmos_tf import collectives
from llmos_tf.inference.sampling import SamplingValues, sample
from llmos_tf.inference.sampling_config import SamplingConfig
from llmos_tf.mesh import AXES
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.spmd.program import current_program

_DEFAULT_SAMPLING = SamplingConfig()
# No token equals it.
_NO_STOP = -1


def generate(
    model: LanguageModel,
    prompt: Any,
    max_new_tokens: int,
    sampling: SamplingConfig = _DEFAULT_SAMPLING,
    stop_token: int | None = None,
) -> np.ndarray:
    """Lets a model go on with prompts.

    The first call traces a program and keeps it with the model; later ones, with prompts of any
    shape and any sampling, run it. Every device of a mesh computes all rows, with its slices of the
    weights, and the same seed gives the same tokens on every mesh.

    Args:
        model: a language model, under a strategy or not.
        prompt: integers ``[B, T]``, rows of equal length.
        max_new_tokens: N at most; T + N is at most the model's positions.
        sampling: how each token is chosen.
        stop_token: ends a row. Generation ends when it has ended all; a row that ended before the
            others goes on with this token.

    Returns:
        int32 ``[B, T + N]``, prompt and new tokens; N is smaller than `max_new_tokens` where every
        row has ended.

    Raises:
        ValueError: arguments that do not fit the model.
        FloatingPointError: the model's logits are infinite or not a number.

    Example:
        >>> model = GPT.from_preset("gpt_tiny")
        >>> generate(model, [[100, 101, 102]], max_new_tokens=5).shape
        (1, 8)
    """  # noqa: DOC502
    tokens_BT = _checked_prompt(model, prompt)
    _check_options(model, tokens_BT.shape[1], max_new_tokens, sampling, stop_token)
    new_BN, length, is_sound = _program_of(model)(
        tf.constant(tokens_BT),
        tf.constant(max_new_tokens, tf.int32),
        tf.constant(_NO_STOP if stop_token is None else stop_token, tf.int32),
        tf.nest.map_structure(
            lambda value, spec: tf.constant(value, spec.dtype),
            SamplingValues.of(sampling),
            SamplingValues.specs(),
        ),
    )
    _check_logits(model, bool(is_sound))
    return np.concatenate([tokens_BT, new_BN.numpy()[:, : int(length)]], axis=1)


class _Generation:
    """The traced program of a model.

    Lengths and sampling are inputs, so there is one trace. An object of its own around the
    `tf.function`: one that is an attribute of the model itself would be saved with it.
    """

    def __init__(self, model: LanguageModel):
        self._model = model
        integer = tf.TensorSpec([], tf.int32)
        self.program = tf.function(
            self._run,
            input_signature=[
                tf.TensorSpec([None, None], tf.int32),
                integer,
                integer,
                SamplingValues.specs(),
            ],
            autograph=False,
        )

    def _run(self, *args: Any) -> tuple[tf.Tensor, ...]:
        strategy = self._model.distribute_strategy
        results = strategy.run(self._replica_run, args=args)
        # Every rank has the same.
        return tuple(strategy.experimental_local_results(result)[0] for result in results)

    def _replica_run(self, *args: Any) -> tuple[tf.Tensor, ...]:
        program = current_program()
        if program is None:
            return _new_tokens(self._model, *args)
        # One token cannot be split by positions, and sampling needs all logits of a row.
        with program.having(sequence_parallel=False, sharded_logits=False):
            return _new_tokens(self._model, *args)


def _program_of(model: LanguageModel) -> tf.types.experimental.PolymorphicFunction:
    """The model's program, made at the first call and kept with it, as Keras keeps its own."""
    if not hasattr(model, "_generation"):
        model._generation = _Generation(model)
    return model._generation.program


def _new_tokens(
    model: LanguageModel,
    prompt_BT: tf.Tensor,
    count: tf.Tensor,
    stop: tf.Tensor,
    sampling: SamplingValues,
) -> tuple[tf.Tensor, ...]:
    """One rank's generation: the prompt at once, then token by token in a loop.

    Returns new tokens ``[B, count]``, how many of them are made, and whether all logits were
    numbers.
    """
    rows, length = tf.unstack(tf.shape(prompt_BT))

    def choose(logits_BV, step, is_done_B, is_sound):
        token_B = _agreed(sample(logits_BV, sampling, step))
        token_B = tf.where(is_done_B, stop, token_B)
        is_sound &= tf.reduce_all(logits_BV < logits_BV.dtype.as_numpy_dtype(np.inf))
        return token_B, is_done_B | (token_B == stop), is_sound

    def is_going(step, new_BN, token_B, is_done_B, is_sound, cache):
        return (step < count) & ~tf.reduce_all(is_done_B)

    def add_token(step, new_BN, token_B, is_done_B, is_sound, cache):
        position = length + step - 1
        logits_BTV, cache = model.decode(token_B[:, tf.newaxis], cache, position)
        token_B, is_done_B, is_sound = choose(logits_BTV[:, -1], step, is_done_B, is_sound)
        new_BN = tf.where(tf.range(count) == step, token_B[:, tf.newaxis], new_BN)
        return step + 1, new_BN, token_B, is_done_B, is_sound, cache

    logits_BTV, cache = model.decode(prompt_BT, model.new_cache(rows, length + count), 0)
    is_done_B = tf.fill([rows], False)
    token_B, is_done_B, is_sound = choose(logits_BTV[:, -1], 0, is_done_B, tf.constant(True))
    new_BN = tf.where(tf.range(count) == 0, token_B[:, tf.newaxis], stop)
    state = (tf.constant(1), new_BN, token_B, is_done_B, is_sound, cache)
    # Steps follow one another, and each one in flight holds a cache.
    step, new_BN, *_, is_sound, _ = tf.while_loop(is_going, add_token, state, parallel_iterations=1)
    return new_BN, step, is_sound


def _agreed(token_B: tf.Tensor) -> tf.Tensor:
    """The first rank's tokens, on all ranks.

    Logits of ranks may differ by rounding. Ranks that go on from different tokens would compute
    with each other's activations, and ranks that stop at different steps would wait for ever.
    """
    return token_B if current_program() is None else collectives.broadcast(token_B, AXES)


def _checked_prompt(model: Any, prompt: Any) -> np.ndarray:
    if not isinstance(model, LanguageModel):
        raise ValueError(
            "`generate` takes a language model with a key-value cache, such as llmos_tf.models.GPT "
            f"or Llama. Received: {type(model).__name__}."
        )
    try:
        tokens = np.asarray(prompt)
    except ValueError:
        raise ValueError(
            "The rows of `prompt` have the same number of tokens; generate from prompts of other "
            f"lengths one by one. Received: {prompt!r}."
        ) from None
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            "`prompt` is a batch of token ids, integers of shape [B, T], such as [[1, 2, 3]]. "
            f"Received: {tokens.dtype} of shape {tokens.shape}."
        )
    if not tokens.size:
        raise ValueError(
            "`prompt` has at least one row and one token, such as that which ends a document. "
            f"Received: shape {tokens.shape}."
        )
    wrong = tokens[(tokens < 0) | (tokens >= model.config.vocab_size)]
    if wrong.size:
        raise ValueError(
            f"The tokens of `prompt` are from 0 to {model.config.vocab_size - 1}, the model's "
            f"vocabulary. Received: {wrong[0]}. Was the text read with another tokenizer?"
        )
    return tokens.astype(np.int32)


def _check_options(
    model: LanguageModel, length: int, max_new_tokens: Any, sampling: Any, stop_token: Any
) -> None:
    if not _is_integer(max_new_tokens) or max_new_tokens < 1:
        raise ValueError(
            f"`max_new_tokens` is a positive integer. Received: max_new_tokens={max_new_tokens!r}."
        )
    room = model.config.max_positions - length
    if max_new_tokens > room:
        raise ValueError(
            f"The model has {model.config.max_positions} positions. Received: a prompt of {length} "
            f"tokens and max_new_tokens={max_new_tokens}. "
            + (f"Take at most {room}." if room > 0 else "Take a shorter prompt.")
        )
    if not isinstance(sampling, SamplingConfig):
        raise ValueError(
            f"`sampling` is a SamplingConfig, such as SamplingConfig(temperature=0.7). "
            f"Received: {sampling!r}."
        )
    vocab_size = model.config.vocab_size
    if stop_token is not None and not (_is_integer(stop_token) and 0 <= stop_token < vocab_size):
        raise ValueError(
            f"`stop_token` is a token from 0 to {vocab_size - 1}, the model's vocabulary, or None. "
            f"Received: stop_token={stop_token!r}."
        )


def _check_logits(model: LanguageModel, is_sound: bool) -> None:
    if not is_sound:
        raise FloatingPointError(
            f"The logits of the model {model.name!r} are infinite or not a number, so there is no "
            "next token. Most likely its weights are, because its training diverged: take an "
            "earlier checkpoint."
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
