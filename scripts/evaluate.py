"""llmos-evaluate: bits per byte of a checkpoint on held-out text.

    llmos-evaluate --checkpoint=llmos_runs/my_run
    llmos-evaluate --checkpoint=llmos_runs/my_run --mesh=tensor=2 --data='text/*.txt'

The mesh need not be the one the checkpoint was trained on. The text is the held-out part of --data,
split as in training.
"""

from llmos_tf.checkpoint import restore_checkpoint
from llmos_tf.data import bigram_bits_per_byte, load_text_data
from llmos_tf.files.writing import write_json
from llmos_tf.scripts.flags import options_from_flags, refusing_misuse, start
from llmos_tf.scripts.setup_run import (
    checkpoint_config,
    checkpoint_path,
    evaluate_with_bar,
    make_model,
    make_strategy,
    require_one_process,
    sequence_length,
)

_FLAGS = (
    "checkpoint",
    "workdir",
    "mesh",
    "zero_stage",
    "sequence_parallel",
    "microbatches",
    "context_method",
    "virtual_devices",
    "global_batch",
    "seq_len",
    "data",
    "tokenizer",
    "seed",
    "json",
)


def main() -> int:
    """Evaluates and prints."""
    with refusing_misuse():
        require_one_process()
        options = options_from_flags()
        path = checkpoint_path(options)
        config = checkpoint_config(path)
        data = load_text_data(options.data, options.tokenizer, sequence_length(options, config))
        if data.tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {data.tokenizer.vocab_size} tokens and the model of {path} "
                f"only {config.vocab_size}. Give the --tokenizer it was trained with."
            )
        model = make_model(config, make_strategy(options), options.seed)
        step = restore_checkpoint(path, model, weights_only=True).step
    held = evaluate_with_bar(model, data, options.global_batch)
    bigram = bigram_bits_per_byte(data.train, data.heldout, data.heldout_bytes)
    result = {
        "checkpoint": str(path),
        "step": step,
        "bits_per_byte": held.bits_per_byte,
        "loss": held.loss,
        "tokens": held.num_tokens,
        "bytes": held.num_bytes,
        "bigram_bits_per_byte": bigram,
    }
    if options.json:
        write_json(options.json, result)
    print(
        f"{path}, step {step}: {held.bits_per_byte:.3f} bits per byte on {held.num_bytes:,} bytes "
        f"(loss {held.loss:.4f} a token; a bigram model: {bigram:.3f} bits per byte)"
    )
    return 0


def run() -> None:
    """Entry point of llmos-evaluate."""
    start(main, _FLAGS)


if __name__ == "__main__":
    run()
