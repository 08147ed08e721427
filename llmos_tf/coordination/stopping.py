"""The step after which all processes stop, when one of them asks for it.

No process ends a step before all have begun it, as each step has collectives of all. So when one
asks, each tells the last step that it is bound to run, and binds itself to no further one; all stop
after the largest of these. Nothing is sent while nobody asks.
"""

import contextlib
import threading

import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.coordination.agreement import Agreement


class StepStop:
    """Counts the steps of a loop that all processes run alike.

    Args:
        agreement: of the processes.
    """

    def __init__(self, agreement: Agreement):
        self._agreement = agreement
        self._lock = threading.Lock()
        self._round = 0
        self._bound = 0
        self._answered = True

    def begin(self) -> None:
        """Begins to count, at a point where no process is in the steps before any more."""
        with self._lock:
            self._round += 1
            self._bound = 1
            self._answered = False

    def ask(self, reason: str) -> None:
        """Asks all processes to stop, and is called between steps.

        Args:
            reason: what `after_step` returns, in each process, unless another one was first.
        """
        # Where another process has asked too, its reason holds.
        with contextlib.suppress(tf.errors.AlreadyExistsError):
            _internal.eager_context.context().set_config_key_value(self._key(), reason)
        self.answer()

    def answer(self) -> None:
        """Tells the last step that this process is bound to run, once."""
        with self._lock:
            if not self._answered:
                self._answered = True
                key = f"{self._key()}/{self._agreement.task}"
                _internal.eager_context.context().set_config_key_value(key, str(self._bound))

    def watch(self, milliseconds: int) -> None:
        """Answers if a process asks meanwhile; called in turn by another thread.

        Args:
            milliseconds: how long to wait.
        """
        key = self._key()
        try:
            _internal.eager_context.context().get_config_key_value(key, milliseconds)
        except tf.errors.DeadlineExceededError:
            return
        if key == self._key():
            self.answer()

    def after_step(self) -> str | None:
        """Returns the reason to stop now, or None to run one more step."""
        with self._lock:
            if not self._answered:
                self._bound += 1
                return None
        key = self._key()
        last = max(
            int(self._agreement.wait_for(f"{key}/{task}", task, "answer when it can stop"))
            for task in range(len(self._agreement.workers))
        )
        if self._bound < last:
            self._bound += 1
            return None
        return _internal.eager_context.context().get_config_key_value(key, 1000)

    def _key(self) -> str:
        return f"llmos_tf/{self._agreement.name}/stop/{self._round}"
