"""The work of llmos-train: `scripts.train` has its help and flags."""

import json
import math
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from llmos_tf.checkpoint import latest_checkpoint, restore_checkpoint, save_checkpoint
from llmos_tf.collectives import traffic
from llmos_tf.data import BatchIterator, TextData
from llmos_tf.inference import SamplingConfig, generate
from llmos_tf.layers import TokenCrossEntropy
from llmos_tf.models import Mixtral, get_preset
from llmos_tf.models.language_model import LanguageModel
from llmos_tf.scripts.checks import zero_note
from llmos_tf.scripts.options import RunOptions
from llmos_tf.scripts.printable import printable
from llmos_tf.scripts.program import refusing_misuse
from llmos_tf.scripts.programs.setup_run import (
    evaluate_with_bar,
    make_model,
    make_strategy,
    read_text,
    with_mesh,
)
from llmos_tf.scripts.recorded import TOKENIZER_FILE, Record, describe_text, to_record
from llmos_tf.training.evaluation import HeldOutLoss
from llmos_tf.training.flops import describe_peak, peak_flops
from llmos_tf.training.interrupt import GracefulStop
from llmos_tf.training.reporting import RunReport, draw_curves, read_metrics
from llmos_tf.training.step import make_train_step


@dataclass(kw_only=True)
class TrainingRun:
    """Everything a training run works with."""

    options: RunOptions
    workdir: Path
    data: TextData
    batches: BatchIterator
    model: LanguageModel
    first_step: int
    peak: tuple[float, str]

    @property
    def baseline(self) -> float:
        """Loss of a bigram model of bytes on the held-out text, in nats per token of this run."""
        data = self.data
        bits = data.bigram_bits_per_byte * data.heldout_bytes
        return bits * math.log(2) / data.heldout.num_targets


def main(options: RunOptions) -> int:
    """Trains, evaluates, and shows a sample.

    Args:
        options: of the program.

    Returns:
        Exit status 0.
    """
    with refusing_misuse():
        training = _prepare(with_mesh(options))
    _describe(training)
    interrupted_at = _train(training)
    if interrupted_at is not None:
        _draw(training)
        print(
            f"Stopped after step {interrupted_at}; the checkpoint is saved. To continue:\n"
            f"  {_resume_command(training.workdir)}"
        )
        return 0
    _finish(training)
    return 0


def _resume_command(workdir: Path) -> str:
    """The command that continues this run: the checkpoint records the other flags."""
    is_installed = Path(sys.argv[0]).stem == "llmos-train"
    program = "llmos-train" if is_installed else "python3 -m llmos_tf.scripts.train"
    return f"{program} --workdir={shlex.quote(str(workdir))} --resume"


def _prepare(options: RunOptions) -> TrainingRun:
    """Reads and checks everything before the first file is written."""
    workdir = Path(options.workdir)
    record = None
    if options.resume:
        record = Record.read(latest_checkpoint(workdir / "checkpoints"))
    config = get_preset(options.preset) if record is None else record.config
    data = read_text(options, config)
    if record is not None:
        _check_text(options, record, data)
    strategy = make_strategy(options)
    model = make_model(config, strategy, options.seed)
    with strategy.scope():
        model.compile(_optimizer(options), loss=TokenCrossEntropy())
    batches = BatchIterator(data.train, batch_size=options.global_batch, seed=options.seed)
    first_step = 0
    if record is not None:
        state = restore_checkpoint(record.path, model)
        batches.restore(state.extra["batches"])
        first_step = state.step
    return TrainingRun(
        options=options,
        workdir=workdir,
        data=data,
        batches=batches,
        model=model,
        first_step=first_step,
        peak=peak_flops(strategy.mesh.devices),
    )


def _check_text(options: RunOptions, record: Record, data: TextData) -> None:
    """Finds files that have changed since the checkpoint was written."""
    theirs, ours = record.text, describe_text(options, data)
    if theirs is not None and theirs["train"] != ours["train"]:
        found = [
            f"{one['train_tokens']:,} training tokens of {one['corpus']}" for one in (theirs, ours)
        ]
        raise ValueError(
            f"The text of --data={options.data} has changed since the checkpoint {record.path} was "
            f"written: it had {found[0]}, and has {found[1]} of another content. Restore the files "
            "to resume, or start a new run in another --workdir."
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
    mesh, length = model.distribute_strategy.mesh, run.data.train.sequence_length
    lines = [
        f"{options.preset}: {model.num_parameters():,} parameters on a mesh of "
        f"{mesh.size} device{'s' * (mesh.size > 1)} ({mesh})",
        f"{run.data.corpus_name}: {run.data.train.num_targets:,} training tokens of "
        f"{options.tokenizer or 'bytes'}, {run.data.heldout_bytes:,} bytes held out",
        f"A step: {options.global_batch} sequences of {length} tokens. MFU (model FLOP "
        f"utilisation) is of {describe_peak(*run.peak)}.",
        zero_note(options.zero_stage, mesh),
        f"Results go to {run.workdir}. Tracing the first step ...",
    ]
    if run.first_step < options.steps:
        print("\n".join(filter(None, lines)), flush=True)


def _train(run: TrainingRun) -> int | None:
    """Trains to the last step; returns the step after which it was interrupted, or None."""
    options, model = run.options, run.model
    step_fn = make_train_step(model, model.optimizer, TokenCrossEntropy())
    length = run.data.train.sequence_length
    record = to_record(options, run.data)
    _keep_tokenizer(run)
    with (
        GracefulStop() as stop,
        RunReport(
            run.workdir,
            run.first_step,
            options.steps,
            options.global_batch * length,
            model.config.flops_per_token(length),
            run.peak[0],
        ) as report,
    ):
        begin = time.perf_counter()
        for step in range(run.first_step + 1, options.steps + 1):
            rate = float(model.optimizer.learning_rate)
            loss = float(step_fn(next(run.batches)))
            report.step(step, loss=loss, learning_rate=rate, **_routing(model))
            if step == run.first_step + 1:
                seconds = time.perf_counter() - begin
                report.say(f"Traced in {seconds:.0f} s. {_traffic_line(model, step_fn)}")
                report.show_bar(step)
                report.pause()
            if step % options.save_every == 0 or step == options.steps or stop.requested:
                _save(run, step, record)
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


def _keep_tokenizer(run: TrainingRun) -> None:
    """Copies the tokenizer into the folder of the run, which can then be moved."""
    copy = run.workdir / TOKENIZER_FILE
    if run.options.tokenizer is not None and not copy.exists():
        run.workdir.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.options.tokenizer, copy)


def _save(run: TrainingRun, step: int, record: dict[str, Any]) -> None:
    save_checkpoint(
        run.workdir / "checkpoints",
        run.model,
        step=step,
        extra={"batches": run.batches.state(), **record},
    )


def _draw(run: TrainingRun, heldout: float | None = None) -> None:
    draw_curves(
        read_metrics(run.workdir / "metrics.jsonl"),
        run.workdir / "curves.png",
        f"{run.options.preset} on {run.model.distribute_strategy.mesh}",
        baseline=run.baseline,
        heldout=heldout,
    )


def _finish(run: TrainingRun) -> None:
    data, options = run.data, run.options
    held = evaluate_with_bar(run.model, data, options.global_batch * 4)
    _draw(run, held.loss)
    summary = _summary(run, held, read_metrics(run.workdir / "metrics.jsonl"))
    for path in filter(None, (run.workdir / "summary.json", options.json)):
        Path(path).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        f"Held-out bits per byte: {held.bits_per_byte:.3f} "
        f"(a bigram model of the same text: {data.bigram_bits_per_byte:.3f})\n"
        f"Speed: {summary['tokens_per_second']:,.0f} tokens/s, model FLOP utilisation "
        f"{summary['mfu']:.1%} of {describe_peak(summary['peak_flops'], summary['peak_source'])}\n"
        f"Left in {run.workdir}: checkpoints/, metrics.jsonl, tensorboard/, curves.png, "
        "summary.json\n"
    )
    _show_sample(run)


def _summary(run: TrainingRun, held: HeldOutLoss, rows: list[dict[str, Any]]) -> dict[str, Any]:
    steady = rows[1:] or rows
    rate = float(np.median([row["tokens_per_second"] for row in steady]))
    peak, source = run.peak
    flops = run.model.config.flops_per_token(run.data.train.sequence_length)
    return {
        "preset": run.options.preset,
        "mesh": str(run.model.distribute_strategy.mesh),
        "parameters": run.model.num_parameters(),
        "steps": run.options.steps,
        "bits_per_byte": held.bits_per_byte,
        "bigram_bits_per_byte": run.data.bigram_bits_per_byte,
        "heldout_loss": held.loss,
        "train_loss": rows[-1]["loss"],
        "tokens_per_second": rate,
        "mfu": rate * flops / peak,
        "peak_flops": peak,
        "peak_source": source,
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
    print(f"Prompt, from the held-out text:\n{printable(decode(prompt[0]))}\n")
    print(f"Continuation:\n{printable(decode(tokens[0, prompt.shape[1] :]))}")
