"""The command line of a program: its help, its flags, and how it starts and refuses. No TensorFlow.

A program is two modules. That of its name, `scripts.train`, holds its help and flags, and imports
neither TensorFlow nor Keras, so that help and errors in flags come at once. The other one,
`scripts.programs.train`, does the work, and is imported when the flags have been checked.
"""

import contextlib
import difflib
import importlib
import io
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import app, flags

from llmos_tf.models.presets import PRESETS
from llmos_tf.scripts import flags as own_flags
from llmos_tf.scripts.flags import FLAGS
from llmos_tf.scripts.quiet import quiet_start

_HELP = ("--help", "-help", "-h", "--helpfull", "--helpshort")


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of the command line.

    Args:
        doc: what --help prints above the flags.
        flags: names of the flags that it takes.
        options: reads and checks them; None where nothing is left to do, which it has printed.
        work: module whose `main(options)` does the work and returns the exit status, None for 0.
        help: flag to help text with its default, where this program's differs from the common one.
        computes: whether it uses devices, which it does in one process.
    """

    doc: str
    flags: tuple[str, ...]
    options: Callable[[], Any]
    work: str
    help: Mapping[str, str] = field(default_factory=dict)
    computes: bool = True

    def run(self) -> None:
        """Parses the flags, does the work, and exits with its status."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Text that a terminal's encoding lacks is no reason to end a run.
                stream.reconfigure(errors="backslashreplace")
        app.run(self._main, flags_parser=self._parse)

    def _main(self, options: Any) -> int | None:
        if options is None:
            return 0
        try:
            with quiet_start():
                work = importlib.import_module(self.work)
            return work.main(options)
        except KeyboardInterrupt:
            print(f"\n{_name()}: stopped.", file=sys.stderr)
            return 130

    def _parse(self, argv: list[str]) -> Any:
        if any(arg in _HELP for arg in argv[1:]):
            if hasattr(signal, "SIGPIPE"):
                # A pager, or head, may close the pipe before it has read all.
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            print(self.help_text())
            sys.exit(0)
        try:
            rest = FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            self._refuse_unknown(error.flagname)
        except flags.Error as error:
            for flag in map(_flag_of, argv[1:]):
                # Of another program, and without the value that it takes there.
                if flag in FLAGS and flag not in self.flags:
                    self._refuse_unknown(flag)
            refuse(f"{error}. See --help for the flags.")
        if len(rest) > 1:
            refuse(f"Only flags are taken, as --name=value. Received: {' '.join(rest[1:])!r}.")
        for flag in FLAGS.get_flags_for_module(own_flags):
            if flag.present and flag.name not in self.flags:
                self._refuse_unknown(flag.name)
        with refusing_misuse():
            if self.computes:
                _refuse_cluster()
            return self.options()

    def _refuse_unknown(self, name: str) -> None:
        """Ends the program for a flag that it does not take, and offers those that it does."""
        known = [*self.flags, *(f"no{n}" for n in self.flags if FLAGS[n].boolean)]
        near = difflib.get_close_matches(name, known, n=2)
        hint = f"Did you mean --{' or --'.join(near)}? " if near else ""
        refuse(f"--{name} is not a flag of this program. {hint}See --help for the flags.")

    def help_text(self) -> str:
        """Returns what --help prints.

        Returns:
            The program's description, and a paragraph for each flag.
        """
        lines = [self.doc.strip(), "", "Flags:"]
        for name in self.flags:
            flag = FLAGS[name]
            default = "" if flag.default is None else f" (default: {flag.default_as_str})"
            text = self.help.get(name, f"{flag.help}{default}")
            indent = " " * 6
            lines.append(f"  --{name}")
            lines += textwrap.wrap(text, 76, initial_indent=indent, subsequent_indent=indent)
            if name == "preset":
                lines += [f"{indent}{line}" for line in _presets()]
        return "\n".join(lines)


@contextlib.contextmanager
def refusing_misuse() -> Iterator[None]:
    """Turns what the user got wrong into one paragraph on stderr and exit status 2.

    Entered around the reading of options, files and checkpoints and the creation of the model: what
    is raised later is a fault of the program, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        refuse(str(error))


def refuse(message: str) -> None:
    """Ends the program for a misuse.

    Args:
        message: what was received and what would work.
    """
    print(f"{_name()}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _flag_of(argument: str) -> str | None:
    """The name in ``--name`` or ``--name=value``."""
    return argument.lstrip("-").partition("=")[0] if argument.startswith("-") else None


def _name() -> str:
    """The program's installed name, also where it is started as a module."""
    return f"llmos-{Path(sys.argv[0]).stem.removeprefix('llmos-')}"


def _refuse_cluster() -> None:
    """Finds a TF_CONFIG of several processes, each of which would do all the work by itself."""
    text = os.environ.get("TF_CONFIG", "")
    try:
        cluster = json.loads(text or "{}").get("cluster") or {}
        tasks = sum(len(addresses) for addresses in cluster.values())
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The environment variable TF_CONFIG cannot be read: {error}. Unset it: this program "
            f"runs in one process. Received: {text}"
        ) from error
    if tasks > 1:
        jobs = ", ".join(f"{len(addresses)} {job}" for job, addresses in cluster.items())
        raise ValueError(
            "This program runs in one process, over all devices of one machine. Received: "
            f"TF_CONFIG with a cluster of {tasks} processes ({jobs}), each of which would do the "
            "whole work. Unset TF_CONFIG. To train in several processes, create a "
            "llmos_tf.strategies.MultiWorkerMeshStrategy in a Keras script."
        )


def _presets() -> list[str]:
    """A table of the presets."""
    rows = [("preset", "parameters", "vocabulary", "positions")]
    for name, config in PRESETS.items():
        counts = (config.num_parameters(), config.vocab_size, config.max_positions)
        rows.append((name, *(f"{count:,}" for count in counts)))
    return [f"{row[0]:14}{row[1]:>17}{row[2]:>12}{row[3]:>11}" for row in rows]
