"""A thread of each process that answers the others, and ends a step that waits too long.

TensorFlow's collective ops have a time limit of their own, for which each starts a thread that
sleeps until then: 600 of them at a limit of ten minutes and one collective a second. So one thread
looks now and then whether a step that has begun has ended.
"""

import atexit
import contextlib
import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.coordination.agreement import Agreement
from llmos_tf.coordination.stopping import StepStop

# Milliseconds that a look at the table of the coordination service takes.
_TURN = 1000
# Seconds for which answers of other processes are waited for.
_ANSWER = 10.0
# Characters of another worker's error.
_SHOWN = 2000
# Parts of the paths of files that are not the user's.
_NOT_THE_SCRIPT = ("site-packages", "llmos_tf", "strategies", "threading.py", "<")

_log = logging.getLogger("llmos_tf")


class Watch:
    """Watches the steps of this process.

    Args:
        agreement: of the processes.
        steps: returns how many steps have begun and how many have ended.
        limit: seconds after which a step that has begun is taken for one that waits for a process
            that does not come; None for no limit.
    """

    def __init__(
        self, agreement: Agreement, steps: Callable[[], tuple[int, int]], limit: float | None
    ):
        self.agreement = agreement
        self.stop = StepStop(agreement)
        # Where this process is in its script, for the messages of others.
        self.position = "outside of fit, evaluate and predict"
        self._steps = steps
        self._limit = limit
        self._answered = False
        self._ended = threading.Event()
        self._main = threading.main_thread()
        self._thread = threading.Thread(target=self._run, name="llmos_tf_watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @contextlib.contextmanager
    def at(self, position: str) -> Iterator[None]:
        """Tells others, while it is entered, where this process is.

        Args:
            position: such as "in evaluate".
        """
        before = self.position
        self.position = position
        try:
            yield
        finally:
            self.position = before

    def report(self, error: Exception) -> None:
        """Tells the others that a step has failed here, so that they do not wait for it.

        Args:
            error: that of the step.
        """
        lines = (line.strip() for line in str(error).splitlines())
        text = " ".join(line for line in lines if line and not line.startswith("File "))
        text = f"{self.agreement.worker(self.agreement.task)} has failed: {text[:_SHOWN]}"
        # One that fails as another one has is not the cause.
        with contextlib.suppress(tf.errors.AlreadyExistsError):
            _table().set_config_key_value(f"{self._key()}/failed", text)

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join(10)

    def _run(self) -> None:
        seen, since = None, time.monotonic()
        while not self._ended.wait(0.1):
            try:
                self.stop.watch(_TURN)
                self._answer()
                steps = self._steps()
                if steps[0] > steps[1] and self._fails_with_another():
                    return
                if steps != seen or steps[0] == steps[1]:
                    seen, since = steps, time.monotonic()
                elif self._limit is not None and time.monotonic() - since > self._limit:
                    self._abort(steps)
                    return
            except tf.errors.OpError as error:
                # The coordination service has ended, and with it what there is to watch: the
                # process finds out by its own next call.
                _log.info("The watch of this worker ends: %s", error)
                return

    def _fails_with_another(self) -> bool:
        """Ends the collectives of this process if another one has failed."""
        try:
            text = _table().get_config_key_value(f"{self._key()}/failed", 100)
        except tf.errors.DeadlineExceededError:
            return False
        _table().abort_collective_ops(tf.errors.ABORTED, text)
        return True

    def _answer(self) -> None:
        """Tells where this process is, when another one has asked."""
        if self._answered:
            return
        try:
            _table().get_config_key_value(f"{self._key()}/asked", 100)
        except tf.errors.DeadlineExceededError:
            return
        self._tell()

    def _tell(self) -> None:
        self._answered = True
        begun, ended = self._steps()
        answer = {"begun": begun, "waits": begun > ended, "place": self._place()}
        _table().set_config_key_value(f"{self._key()}/{self.agreement.task}", json.dumps(answer))

    def _abort(self, steps: tuple[int, int]) -> None:
        """Ends the collectives of this process, with an error that names who is missing."""
        # Another process that waits too may have asked.
        with contextlib.suppress(tf.errors.AlreadyExistsError):
            _table().set_config_key_value(f"{self._key()}/asked", "")
        if not self._answered:
            self._tell()
        missing = []
        deadline = time.monotonic() + _ANSWER
        for task in range(len(self.agreement.workers)):
            left = max(deadline - time.monotonic(), 0.1)
            try:
                text = _table().get_config_key_value(f"{self._key()}/{task}", int(1000 * left))
            except tf.errors.DeadlineExceededError:
                missing.append(f"{self.agreement.worker(task)} does not answer")
                continue
            answer = json.loads(text)
            if not answer["waits"] or answer["begun"] != steps[0]:
                missing.append(f"{self.agreement.worker(task)} is {answer['place']}")
        others = "; ".join(missing) or "all are in a step, of which some may have other collectives"
        _table().abort_collective_ops(
            tf.errors.DEADLINE_EXCEEDED,
            f"{self.agreement.worker(self.agreement.task)} has waited {self._limit:.0f} seconds in "
            f"a collective, which the op below names with its axes, for other workers: {others}. "
            "All workers run the same script on the same data. If a step, or the input of another "
            "worker, takes longer, raise collective_timeout=.",
        )

    def _place(self) -> str:
        """Where the main thread is, by the innermost line of the script."""
        frame = sys._current_frames().get(self._main.ident)
        frames = traceback.extract_stack(frame) if frame is not None else []
        own = [f for f in frames if not any(part in f.filename for part in _NOT_THE_SCRIPT)]
        line = next(reversed(own or frames), None)
        where = "" if line is None else f", at {line.filename}:{line.lineno} in {line.name}"
        return self.position + where

    def _key(self) -> str:
        return f"llmos_tf/{self.agreement.name}/watch"


def _table() -> Any:
    """What has the table of strings of the coordination service."""
    return _internal.eager_context.context()
