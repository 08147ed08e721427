"""llmos-train: trains a language model over a mesh of devices.

With no flags it trains gpt_tiny, a GPT of 0.8 million parameters, on the source text of Python's
standard library, over data=2,tensor=2 on four virtual CPU devices, in a few minutes. It shows loss,
speed and time left, and leaves in the work folder: checkpoints/, metrics.jsonl, tensorboard/,
curves.png and summary.json. Ctrl-C (or SIGTERM) saves and ends; --resume goes on bit for bit.

    llmos-train
    llmos-train --preset=gpt2_small --mesh=fsdp=8 --data='text/*.jsonl' --tokenizer=tokenizer.json
    llmos-train --workdir=my_run --resume
"""

import contextlib
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from llmos_tf.checkpoint import restore_latest, save_checkpoint
from llmos_tf.collectives import traffic
from llmos_tf.data import BatchIterator, TextData, bigram_bits_per_byte, load_text_data
from llmos_tf.files.writing import write_json
from llmos_tf.inference import SamplingConfig, generate
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import Mixtral
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.scripts.flags import options_from_flags, refusing_misuse, start
from llmos_tf.scripts.options import RunOptions
from llmos_tf.scripts.setup_run import (
    claimed_workdir,
    evaluate_with_bar,
    make_model,
    make_strategy,
    preset_config,
    require_one_process,
    sequence_length,
)
from llmos_tf.training.evaluation import HeldOutLoss
from llmos_tf.training.flops import peak_flops
from llmos_tf.training.interrupt import GracefulStop
from llmos_tf.training.reporting import RunReport, draw_curves, read_metrics
from llmos_tf.training.step import make_train_step

_FLAGS = (
    "preset",
    "mesh",
    "zero_stage",
    "sequence_parallel",
    "microbatches",
    "schedule",
    "num_chunks",
    "context_method",
    "gradient_compression",
    "rematerialise",
    "offload",
    "reshard_after_forward",
    "virtual_devices",
    "global_batch",
    "seq_len",
    "steps",
    "learning_rate",
    "data",
    "tokenizer",
    "workdir",
    "resume",
    "save_every",
    "seed",
    "json",
)


@dataclass(kw_only=True)
class TrainingRun:
    """Everything a training run works with."""

    options: RunOptions
    workdir: Path
    data: TextData
    batches: BatchIterator
    model: LanguageModel
    first_step: int


def main() -> int:
    """Trains, evaluates, and shows a sample."""
    # The work folder stays claimed until the run ends.
    with contextlib.ExitStack() as claim:
        with refusing_misuse():
            require_one_process()
            training = _prepare(claim)
        _run(training)
    return 0


def _run(training: TrainingRun) -> None:
    _describe(training)
    interrupted_at = _train(training)
    workdir, options = training.workdir, training.options
    rows = read_metrics(workdir / "metrics.jsonl")
    draw_curves(rows, workdir / "curves.png", f"{options.preset} on {options.mesh or 'one device'}")
    if interrupted_at is not None:
        print(
            f"Stopped after step {interrupted_at}; the checkpoint is saved. Go on with:\n"
            f"  {_resume_command(workdir)}"
        )
        return
    _finish(training, rows)


def _resume_command(workdir: Path) -> str:
    """The command of this run, with what makes it go on."""
    is_installed = Path(sys.argv[0]).stem == "llmos-train"
    program = "llmos-train" if is_installed else "python3 -m llmos_tf.scripts.train"
    given = shlex.join(arg for arg in sys.argv[1:] if arg not in ("--resume", "--noresume"))
    named = "" if "--workdir" in given else f"--workdir={shlex.quote(str(workdir))}"
    return " ".join(filter(None, (program, given, named, "--resume")))


def _prepare(claim: contextlib.ExitStack) -> TrainingRun:
    """Claims the work folder, and reads and checks everything before a file is written to it."""
    options = options_from_flags()
    config = preset_config(options)
    workdir = claim.enter_context(claimed_workdir(options))
    length = sequence_length(options, config)
    data = load_text_data(options.data, options.tokenizer, length)
    if data.tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {data.tokenizer.vocab_size} tokens and --preset={options.preset} "
            f"only {config.vocab_size}. Take a preset with a larger vocabulary, or leave "
            "--tokenizer out for bytes."
        )
    strategy = make_strategy(options)
    model = make_model(config, strategy, options.seed)
    with strategy.scope():
        model.compile(_optimizer(options), loss=TokenCrossEntropy())
    batches = BatchIterator(data.train, batch_size=options.global_batch, seed=options.seed)
    first_step = 0
    if options.resume:
        state = restore_latest(workdir / "checkpoints", model)
        for path, reason in state.skipped:
            print(f"Skipped the damaged checkpoint {path.name}: {reason}", file=sys.stderr)
        batches.restore(state.extra.get("batches"))
        first_step = state.step
    return TrainingRun(
        options=options,
        workdir=workdir,
        data=data,
        batches=batches,
        model=model,
        first_step=first_step,
    )


def _optimizer(options: RunOptions) -> keras.optimizers.Optimizer:
    """AdamW with a warm-up and a cosine to a tenth of the peak rate."""
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=options.steps,
        alpha=0.1,
        warmup_target=options.learning_rate,
        warmup_steps=min(100, max(1, options.steps // 20)),
    )
    return keras.optimizers.AdamW(
        schedule, weight_decay=0.1, beta_1=0.9, beta_2=0.95, global_clipnorm=1.0
    )


def _describe(run: TrainingRun) -> None:
    options, model = run.options, run.model
    mesh = model.distribute_strategy.mesh
    print(
        f"{options.preset}: {model.num_parameters():,} parameters on a mesh of "
        f"{mesh.size} devices ({mesh})\n"
        f"{run.data.corpus_name}: {run.data.train.num_targets:,} training tokens, "
        f"{run.data.heldout_bytes:,} bytes held out\n"
        f"Results go to {run.workdir}. Tracing the first step ...",
        flush=True,
    )


def _train(run: TrainingRun) -> int | None:
    """Trains to the last step; returns the step after which it was interrupted, or None."""
    options, model = run.options, run.model
    step_fn = make_train_step(model, model.optimizer, TokenCrossEntropy())
    length = run.data.train.sequence_length
    peak, _ = peak_flops(model.distribute_strategy.mesh.devices)
    with (
        GracefulStop() as stop,
        RunReport(
            run.workdir,
            run.first_step,
            options.steps,
            options.global_batch * length,
            model.config.flops_per_token(length),
            peak,
        ) as report,
    ):
        for step in range(run.first_step + 1, options.steps + 1):
            rate = float(model.optimizer.learning_rate)
            loss = float(step_fn(next(run.batches)))
            report.step(step, loss=loss, learning_rate=rate, **_routing(model))
            if step == run.first_step + 1:
                report.say(_traffic_line(model, step_fn))
                report.pause()
            if step % options.save_every == 0 or step == options.steps or stop.requested:
                _save(run, step)
                report.pause()
            if stop.requested and step < options.steps:
                report.say(f"{stop.requested} received.")
                return step
    return None


def _traffic_line(model: LanguageModel, step_fn: Any) -> str:
    """What each device sends in a step, by axis, of the stage that sends most."""
    sums: dict[str, int] = {}
    for row in traffic(model.distribute_strategy, step_fn):
        sums[row["axis"]] = sums.get(row["axis"], 0) + row["bytes"]
    by_axis = ", ".join(f"{count:,} bytes along {axis}" for axis, count in sums.items())
    return f"In a step each device sends {by_axis or 'nothing'}."


def _routing(model: LanguageModel) -> dict[str, float]:
    """How busy the experts of a mixture model were in the last step."""
    if not isinstance(model, Mixtral):
        return {}
    return {name: float(value) for name, value in model.routing_summary().items()}


def _save(run: TrainingRun, step: int) -> None:
    save_checkpoint(
        run.workdir / "checkpoints",
        run.model,
        step=step,
        extra={"batches": run.batches.state(), "options": run.options.to_dict()},
    )


def _finish(run: TrainingRun, rows: list[dict[str, Any]]) -> None:
    data, options = run.data, run.options
    held = evaluate_with_bar(run.model, data, options.global_batch * 4)
    bigram = bigram_bits_per_byte(data.train, data.heldout, data.heldout_bytes)
    summary = _summary(run, held, bigram, rows)
    for path in filter(None, (run.workdir / "summary.json", options.json)):
        write_json(path, summary)
    print(
        f"Held-out bits per byte: {held.bits_per_byte:.3f} "
        f"(a bigram model of the same text: {bigram:.3f})\n"
        f"Speed: {summary['tokens_per_second']:,.0f} tokens/s, "
        f"model FLOP utilisation {summary['mfu']:.1%}\n"
        f"Left in {run.workdir}: checkpoints/, metrics.jsonl, tensorboard/, curves.png, "
        "summary.json\n"
    )
    _show_sample(run)


def _summary(
    run: TrainingRun, held: HeldOutLoss, bigram: float, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    steady = rows[1:] or rows
    return {
        "preset": run.options.preset,
        "mesh": str(run.model.distribute_strategy.mesh),
        "parameters": run.model.num_parameters(),
        "steps": run.options.steps,
        "bits_per_byte": held.bits_per_byte,
        "bigram_bits_per_byte": bigram,
        "heldout_loss": held.loss,
        "train_loss": rows[-1]["loss"],
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in steady])),
        "mfu": float(np.median([row["mfu"] for row in steady])),
        "workdir": str(run.workdir),
    }


def _show_sample(run: TrainingRun) -> None:
    """Prints how the model goes on from the beginning of the held-out text."""
    length = run.data.heldout.sequence_length
    prompt = np.asarray(run.data.heldout.inputs[:1, : length // 2])
    try:
        tokens = generate(
            run.model,
            prompt,
            max_new_tokens=length - prompt.shape[1],
            sampling=SamplingConfig(
                temperature=0.7,
                top_k=40,
                seed=run.options.seed,
                vocab_size=run.data.tokenizer.vocab_size,
            ),
        )
    except FloatingPointError as error:
        # The run has diverged; everything it left is there to find out why.
        print(f"There is no sample: {error}")
        return
    decode = run.data.tokenizer.decode
    print(f"Prompt, from the held-out text:\n{decode(prompt[0])}\n")
    print(f"Continuation:\n{decode(tokens[0, prompt.shape[1] :])}")


def run() -> None:
    """Entry point of llmos-train."""
    start(main, _FLAGS)


if __name__ == "__main__":
    run()
