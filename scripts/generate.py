"""llmos-generate: lets a checkpoint go on with a text.

    llmos-generate --checkpoint=llmos_runs/my_run --prompt='def main('
    llmos-generate --checkpoint=llmos_runs/my_run --prompt='import ' --temperature=0 --mesh=tensor=2

It keeps keys and values of earlier positions, works on any mesh, and gives the same text on all of
them for the same --seed. --temperature=0 always takes the likeliest token.
"""

import json
from pathlib import Path

import numpy as np

from llmos_tf.checkpoint import restore_checkpoint
from llmos_tf.data import load_tokenizer
from llmos_tf.inference import SamplingConfig, generate
from llmos_tf.scripts.flags import FLAGS, options_from_flags, refusing_misuse, start
from llmos_tf.scripts.setup_run import (
    checkpoint_config,
    checkpoint_path,
    make_model,
    make_strategy,
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
        options = options_from_flags()
        path = checkpoint_path(options)
        if not FLAGS.prompt:
            raise ValueError("What should the model go on with? Give --prompt='some text'.")
        sampling = SamplingConfig(
            temperature=FLAGS.temperature,
            top_k=FLAGS.top_k,
            top_p=FLAGS.top_p,
            seed=options.seed,
        )
        tokenizer = load_tokenizer(options.tokenizer)
        config = checkpoint_config(path)
        prompt = np.asarray(tokenizer.encode(FLAGS.prompt), np.int32)[np.newaxis]
        room = config.max_positions - prompt.shape[1]
        count = room if FLAGS.max_new_tokens is None else FLAGS.max_new_tokens
        if not 1 <= count <= room:
            raise ValueError(
                f"The prompt of {prompt.shape[1]} tokens and {count} new ones do not fit the "
                f"{config.max_positions} positions of the model. Give a shorter --prompt, or "
                "a smaller --max_new_tokens."
            )
        model = make_model(config, make_strategy(options), options.seed)
        restore_checkpoint(path, model, weights_only=True)
        tokens = generate(model, prompt, count, sampling, stop_token=tokenizer.end_of_document)
    text = tokenizer.decode(tokens[0, prompt.shape[1] :])
    if options.json:
        result = {"prompt": FLAGS.prompt, "text": text, "tokens": tokens[0].tolist()}
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(FLAGS.prompt + text)
    return 0


def run() -> None:
    """Entry point of llmos-generate."""
    start(main, _FLAGS)


if __name__ == "__main__":
    run()
