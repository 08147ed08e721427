"""The work of llmos-evaluate: `scripts.evaluate` has its help and flags."""

import json
import sys
from pathlib import Path

from llmos_tf.checkpoint import restore_checkpoint
from llmos_tf.scripts.options import RunOptions
from llmos_tf.scripts.program import refusing_misuse
from llmos_tf.scripts.programs.setup_run import (
    evaluate_with_bar,
    make_model,
    make_strategy,
    read_text,
    with_mesh,
)
from llmos_tf.scripts.recorded import Record


def main(options: RunOptions) -> int:
    """Evaluates and prints.

    Args:
        options: of the program.

    Returns:
        Exit status 0.
    """
    path = Path(options.checkpoint)
    with refusing_misuse():
        options = with_mesh(options)
        record = Record.read(path)
        data = read_text(options, record.config)
        model = make_model(record.config, make_strategy(options), options.seed)
        step = restore_checkpoint(path, model, weights_only=True).step
    if record.text and record.text["heldout"] != data.heldout.fingerprint:
        print(
            f"Note: the held-out text is not that of the training run ({record.text['corpus']}, "
            f"{record.text['heldout_bytes']:,} bytes).",
            file=sys.stderr,
        )
    held = evaluate_with_bar(model, data, options.global_batch)
    result = {
        "checkpoint": str(path),
        "step": step,
        "data": data.corpus_name,
        "bits_per_byte": held.bits_per_byte,
        "loss": held.loss,
        "tokens": held.num_tokens,
        "bytes": held.num_bytes,
        "bigram_bits_per_byte": data.bigram_bits_per_byte,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"{path}, step {step}: {held.bits_per_byte:.3f} bits per byte on {held.num_bytes:,} bytes "
        f"held out of {data.corpus_name} (loss {held.loss:.4f} a token; a bigram model of bytes: "
        f"{data.bigram_bits_per_byte:.3f} bits per byte)"
    )
    return 0
