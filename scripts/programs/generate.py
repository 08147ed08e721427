"""The work of llmos-generate: `scripts.generate` has its help and flags."""

import json
from pathlib import Path

import numpy as np

from llmos_tf.checkpoint import restore_checkpoint
from llmos_tf.config import ModelConfig
from llmos_tf.data import Tokenizer
from llmos_tf.inference import generate
from llmos_tf.scripts.options import GenerateOptions
from llmos_tf.scripts.printable import printable
from llmos_tf.scripts.program import refuse, refusing_misuse
from llmos_tf.scripts.programs.setup_run import (
    make_model,
    make_strategy,
    read_tokenizer,
    with_mesh,
)
from llmos_tf.scripts.recorded import Record


def main(options: GenerateOptions) -> int:
    """Generates and prints.

    Args:
        options: of the program.

    Returns:
        Exit status 0.
    """
    with refusing_misuse():
        run = with_mesh(options.run)
        path = Path(run.checkpoint)
        config = Record.read(path).config
        tokenizer = read_tokenizer(run, config)
        prompt = _read_prompt(options.prompt, tokenizer)
        count = _count_new_tokens(options.max_new_tokens, prompt, config)
        model = make_model(config, make_strategy(run), run.seed)
        restore_checkpoint(path, model, weights_only=True)
    sampling = options.sampling(tokenizer.vocab_size)
    try:
        tokens = generate(model, prompt, count, sampling, stop_token=tokenizer.end_of_document)
    except FloatingPointError as error:
        refuse(str(error))
    text = tokenizer.decode(tokens[0, prompt.shape[1] :])
    if run.json:
        result = {"prompt": options.prompt, "text": text, "tokens": tokens[0].tolist()}
        Path(run.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    whole = options.prompt + text
    print(whole if options.raw else printable(whole))
    return 0


def _read_prompt(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of --prompt, one row."""
    prompt = tokenizer.encode(text)
    if not len(prompt):
        raise ValueError(f"The tokenizer makes no token of --prompt={text!r}. Give a longer text.")
    return np.asarray(prompt, np.int32)[np.newaxis]


def _count_new_tokens(wanted: int | None, prompt: np.ndarray, config: ModelConfig) -> int:
    """--max_new_tokens, checked; all positions left where it is not given."""
    length, positions = prompt.shape[1], config.max_positions
    if length >= positions:
        raise ValueError(
            f"--prompt has {length} tokens, and the model {positions} positions for the prompt and "
            f"what follows. Give one of at most {positions - 1} tokens."
        )
    count = positions - length if wanted is None else wanted
    if not 1 <= count <= positions - length:
        raise ValueError(
            f"After a prompt of {length} tokens, --max_new_tokens is from 1 to {positions - length}"
            f": the model has {positions} positions. Received: {count}."
        )
    return count
