"""The work of llmos-verify: `scripts.verify` has its help and flags."""

import importlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf
import tqdm

from llmos_tf import devices
from llmos_tf.scripts.options import VerifyOptions
from llmos_tf.scripts.program import refusing_misuse
from llmos_tf.testing import Report, Row, Verification
from llmos_tf.testing.runs import describe
from llmos_tf.testing.verification import report_of

_WIDTH = 100


def main(options: VerifyOptions) -> int:
    """Verifies and prints.

    Args:
        options: of the program.

    Returns:
        Exit status: 1 where something differs.
    """
    # A new model for each run is a new trace for each run.
    tf.get_logger().setLevel("ERROR")
    with refusing_misuse():
        _make_devices(options)
        verification = _verification(options)
        with _progress("one device", verification.steps) as on_step:
            verification.run_one_device(on_step)
    _print_head(options, verification)
    rows: list[Row] = []
    for case in verification.cases:
        with refusing_misuse(), _progress(str(case.mesh), verification.steps) as on_step:
            found = verification.run(case, on_step)
        _print_rows(found, _width_of_meshes(verification))
        rows += found
    report = report_of(verification, rows)
    _print_end(report)
    if options.json:
        text = json.dumps({"model": options.model, "batches": options.batches, **report.to_dict()})
        Path(options.json).write_text(f"{text}\n", encoding="utf-8")
    return 0 if report.agrees else 1


def _make_devices(options: VerifyOptions) -> None:
    """Makes as many CPU devices as the largest mesh needs, on a machine without GPUs."""
    wanted = options.virtual_devices
    if wanted is None and not tf.config.list_physical_devices("GPU"):
        wanted = max(mesh.size for mesh in options.parsed_meshes)
    if wanted is not None:
        tf.config.set_visible_devices([], "GPU")
        devices.configure_virtual_cpus(wanted)


def _verification(options: VerifyOptions) -> Verification:
    """Finds the user's functions, and checks all that can be known before the first step."""
    if os.getcwd() not in sys.path:
        # An installed program has its own folder there, and not the user's.
        sys.path.insert(0, os.getcwd())
    build = _function("model", options.model)
    batches = _called("batches", options.batches)
    layouts = None if options.layout_map is None else _called("layout_map", options.layout_map)
    return Verification(
        build,
        batches,
        options.parsed_meshes,
        steps=options.steps,
        zero_stage=options.zero_stage,
        sequence_parallel=options.sequence_parallel,
        layout_map=layouts,
        num_microbatches=options.microbatches,
        schedule=options.schedule,
        num_chunks=options.num_chunks,
        context_method=options.context_method,
        dtype=options.dtype,
        tolerance=options.tolerance,
        seed=options.seed,
    )


def _function(flag: str, text: str) -> Callable[[], Any]:
    """What MODULE:FUNCTION names."""
    module_name, _, name = text.partition(":")
    if not module_name or not name or module_name.endswith(".py"):
        raise ValueError(
            f"--{flag} is MODULE:FUNCTION, with dots in the module's name and no .py, such as "
            f"--{flag}=my_package.my_module:{name or 'build'}. Received: {text!r}."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"--{flag}={text}: the module {module_name} cannot be imported from {os.getcwd()}. "
            f"{describe(error)}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        own = [n for n in names if getattr(vars(module)[n], "__module__", None) == module_name]
        raise ValueError(
            f"--{flag}={text}: {module_name} has no function {name!r}. "
            f"Its functions: {', '.join(own) or 'none'}."
        )
    return function


def _called(flag: str, text: str) -> Any:
    """What the function that MODULE:FUNCTION names returns."""
    function = _function(flag, text)
    try:
        return function()
    except Exception as error:
        raise ValueError(f"--{flag}={text} raised {describe(error)}") from error


@contextmanager
def _progress(name: str, steps: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, gone when it has ended; elsewhere a line on stderr."""
    if not sys.stderr.isatty():
        print(f"running {name}", file=sys.stderr, flush=True)
        yield lambda: None
        return
    with tqdm.tqdm(desc=name, total=steps, unit="step", leave=False) as bar:
        yield lambda: bar.update() and None


# --- what is printed ------------------------------------------------------------------------------


def _print_head(options: VerifyOptions, verification: Verification) -> None:
    _print_wrapped(
        f"{options.model}: {verification.steps} steps in {verification.dtype} against one device. "
        f"Allowed: |Δ| <= {verification.tolerance:g} · (1 + |value|)."
    )
    for note in verification.notes:
        _print_wrapped(note)
    print()
    width = _width_of_meshes(verification)
    print(f"{'mesh':{width}}  {'compared':9}  {'largest |Δ|':>11}  verdict")


def _width_of_meshes(verification: Verification) -> int:
    texts = [text for case in verification.cases for text in (str(case.mesh), case.parallelism)]
    return max(len(text) for text in texts)


def _print_rows(rows: list[Row], width: int) -> None:
    left = [rows[0].mesh, rows[0].parallelism, *[""] * len(rows)]
    for text, row in zip(left, rows, strict=False):
        # The error itself is told below the table.
        verdict = row.verdict if row.agrees else row.verdict.partition(":")[0].upper()
        print(f"{text:{width}}  {row.feature:9}  {_difference(row):>11}  {verdict}")
    if len(rows) == 1:
        print(rows[0].parallelism)
    sys.stdout.flush()


def _difference(row: Row) -> str:
    if row.difference is None:
        return "-"
    if row.feature == "storage":
        return f"{row.difference:,.0f} bytes"
    return f"{row.difference:.1e}" if row.difference else "0"


def _print_end(report: Report) -> None:
    print()
    told: set[tuple] = set()
    for row in report.failures:
        _print_wrapped(_explained(row))
        if row.hint is not None and (row.mesh, row.hint) not in told:
            _print_wrapped(f"    {row.hint}")
        told.add((row.mesh, row.hint))
    if report.agrees:
        print("All agree.")
    else:
        print(f"\n{len(report.failures)} of {len(report.rows)} do not agree.")


def _explained(row: Row) -> str:
    if row.feature == "run":
        return f"{row.mesh}: {row.verdict}"
    step = "" if row.step is None else f", step {row.step}"
    return f"{row.mesh}, {row.feature}{step}: {row.variable} {row.detail}."


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, _WIDTH, subsequent_indent="    ", break_on_hyphens=False))
