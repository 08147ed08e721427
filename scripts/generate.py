"""llmos-generate: lets a checkpoint go on with a text.

    llmos-generate --checkpoint=llmos_runs/my_run --prompt='def main('
    llmos-generate --checkpoint=llmos_runs/my_run --prompt='import ' --temperature=0 --mesh=tensor=2

It keeps keys and values of earlier positions, works on any mesh, and gives the same text on all of
them for the same --seed. --temperature=0 always takes the likeliest token.
"""

import numpy as np

from llmos_tf.checkpoint import restore_checkpoint
from llmos_tf.config import ModelConfig
from llmos_tf.data import Tokenizer, load_tokenizer
from llmos_tf.files.writing import write_json
from llmos_tf.inference import SamplingConfig, generate
from llmos_tf.scripts.flags import FLAGS, options_from_flags, refuse, refusing_misuse, start
from llmos_tf.scripts.setup_run import (
    checkpoint_config,
    checkpoint_path,
    make_model,
    make_strategy,
    require_one_process,
)

_FLAGS = (
    "checkpoint",
    "workdir",
    "prompt",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "mesh",
    "zero_stage",
    "virtual_devices",
    "tokenizer",
    "seed",
    "json",
)


def main() -> int:
    """Generates and prints."""
    with refusing_misuse():
        require_one_process()
        options = options_from_flags()
        path = checkpoint_path(options)
        config = checkpoint_config(path)
        tokenizer = load_tokenizer(options.tokenizer)
        sampling = SamplingConfig(
            temperature=FLAGS.temperature,
            top_k=FLAGS.top_k,
            top_p=FLAGS.top_p,
            seed=options.seed,
            vocab_size=tokenizer.vocab_size,
        )
        prompt = _read_prompt(tokenizer, config)
        count = _count_new_tokens(prompt, config)
        model = make_model(config, make_strategy(options), options.seed)
        restore_checkpoint(path, model, weights_only=True)
    try:
        tokens = generate(model, prompt, count, sampling, stop_token=tokenizer.end_of_document)
    except FloatingPointError as error:
        refuse(str(error))
    text = tokenizer.decode(tokens[0, prompt.shape[1] :])
    if options.json:
        result = {"prompt": FLAGS.prompt, "text": text, "tokens": tokens[0].tolist()}
        write_json(options.json, result)
    print(FLAGS.prompt + text)
    return 0


def _read_prompt(tokenizer: Tokenizer, config: ModelConfig) -> np.ndarray:
    """The tokens of --prompt, one row."""
    if not FLAGS.prompt:
        raise ValueError("What should the model go on with? Give --prompt='some text'.")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model in the checkpoint only "
            f"{config.vocab_size}. Give the --tokenizer that it was trained with."
        )
    prompt = tokenizer.encode(FLAGS.prompt)
    if not len(prompt):
        raise ValueError(
            f"The tokenizer makes no token of --prompt={FLAGS.prompt!r}. Give a longer text."
        )
    return np.asarray(prompt, np.int32)[np.newaxis]


def _count_new_tokens(prompt: np.ndarray, config: ModelConfig) -> int:
    """--max_new_tokens, checked; all positions left where it is not given."""
    length, positions = prompt.shape[1], config.max_positions
    if length >= positions:
        raise ValueError(
            f"--prompt has {length} tokens, and the model {positions} positions for the prompt and "
            f"what follows. Give one of at most {positions - 1} tokens."
        )
    count = positions - length if FLAGS.max_new_tokens is None else FLAGS.max_new_tokens
    if not 1 <= count <= positions - length:
        raise ValueError(
            f"After a prompt of {length} tokens, --max_new_tokens is from 1 to {positions - length}"
            f": the model has {positions} positions. Received: {count}."
        )
    return count


def run() -> None:
    """Entry point of llmos-generate."""
    start(main, _FLAGS)


if __name__ == "__main__":
    run()
