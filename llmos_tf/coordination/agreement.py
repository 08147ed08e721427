"""Agreement between the processes of a cluster, outside of programs.

TensorFlow's coordination service, which `devices.connect_workers` starts, keeps a table of strings
that all processes read, and notices a process that has died. A wait is made of short ones, so that
Ctrl-C ends it, and a process that has died is reported instead of waited for.
"""

import base64
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from llmos_tf import _internal
from llmos_tf.coordination.random_state import random_state, set_random_state

# Milliseconds between checks that all processes are alive.
TURN = 2000
# Seconds after which a wait is reported, and reported again.
NOTICE = 20.0
# Characters of one string of the table.
_CHUNK = 1 << 20
# Differences that an error lists.
_LISTED = 8

_log = logging.getLogger("llmos_tf")


class Agreement:
    """A line between the processes of a cluster, each of which makes the same calls in order.

    Args:
        name: the same in all processes, and another one for each line.
        limit: seconds that a check waits for other processes; None for no limit.
    """

    def __init__(self, name: str, limit: float | None = None):
        self.name = name
        self.limit = limit
        self._calls = itertools.count()
        self.workers, self.task = _internal.connected_cluster()

    @property
    def is_chief(self) -> bool:
        """Whether this is process 0, which writes files and whose random state all take."""
        return self.task == 0

    def worker(self, task: int) -> str:
        """Returns how messages name a process.

        Args:
            task: its index.

        Returns:
            Its index and address.
        """
        return f"worker {task} ({self.workers[task]})"

    def from_chief(self, value: str) -> str:
        """Returns the value of process 0, in every process.

        Args:
            value: that of process 0; others' are ignored.

        Returns:
            The value.
        """
        key = self._key()
        if self.is_chief:
            _table().set_config_key_value(key, value)
        return self.wait_for(key, 0, "")

    def from_all(self, value: str, what: str = "", limit: float | None = None) -> list[str]:
        """Returns the values of all processes, and so waits for all.

        Args:
            value: that of this process.
            what: what the others have to do, for messages.
            limit: seconds to wait; None for no limit.

        Returns:
            A value for each process, in order.
        """
        key = self._key()
        _table().set_config_key_value(f"{key}/{self.task}", value)
        tasks = range(len(self.workers))
        return [self.wait_for(f"{key}/{task}", task, what, limit) for task in tasks]

    def require_same(self, what: str, value: str | Mapping[str, str]) -> None:
        """Checks that all processes have the same value.

        Args:
            what: names it in the error.
            value: this process's; of a mapping the error names the entries that differ.

        Raises:
            ValueError: they differ.
            TimeoutError: a process does not come to the same check within `limit`.
        """  # noqa: DOC502
        entries = {what: value} if isinstance(value, str) else dict(value)
        text = json.dumps(entries, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        does = f"compare {what}"
        digests = self.from_all(digest, does, self.limit)
        if len(set(digests)) == 1:
            return
        all_entries = [json.loads(one) for one in self.from_all(text, does, self.limit)]
        self.refuse(what, all_entries)

    def refuse(self, what: str, entries: list[dict[str, str] | None]) -> NoReturn:
        """Raises the error of processes that have unlike values.

        Args:
            what: names the values.
            entries: of each process; None for one that has no part in it.

        Raises:
            ValueError: always; it lists the entries that differ.
        """
        own = [(task, one) for task, one in enumerate(entries) if one is not None]
        names = dict.fromkeys(name for _, one in own for name in one)
        differing = [n for n in names if len({one.get(n, "none") for _, one in own}) > 1]
        # What only some have follows from what they have of another kind.
        in_all = [n for n in differing if all(n in one for _, one in own)]
        differing = in_all or differing
        lines = [
            (f"{name}: " if name != what else "")
            + "; ".join(f"{self.worker(task)}: {one.get(name, 'none')}" for task, one in own)
            for name in differing[:_LISTED]
        ]
        if len(differing) > _LISTED:
            lines.append(f"and {len(differing) - _LISTED} more")
        received = lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)
        raise ValueError(f"All workers must have the same {what}. Received: {received}.")

    def value_of_chief(self, value: tf.Tensor, name: str) -> tf.Tensor:
        """Returns the value of process 0, which is sent where another process has another one.

        Args:
            value: this process's, of the same shape and dtype in each.
            name: of the variable, for messages.

        Returns:
            The value of process 0.

        Raises:
            ValueError: process 0 has a value of another shape or dtype.
        """
        array = np.asarray(value.numpy())
        if array.dtype == object:
            # Strings, which nothing draws at random.
            return value
        what, key = f"create the variable {name}", self._key()
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        mine = f"{array.dtype} {list(array.shape)} {digest}"
        if self.is_chief:
            _table().set_config_key_value(key, mine)
            others = range(1, len(self.workers))
            found = [self.wait_for(f"{key}/{i}", i, what, self.limit) for i in others]
            receivers = [i for i, answer in zip(others, found, strict=True) if answer == "differs"]
            if receivers:
                self._send(f"{key}/value", array, receivers)
            return value
        chief = self.wait_for(key, 0, what, self.limit)
        _table().set_config_key_value(f"{key}/{self.task}", "same" if chief == mine else "differs")
        if chief == mine:
            return value
        if chief.rpartition(" ")[0] != mine.rpartition(" ")[0]:
            raise ValueError(
                f"All workers create the same variables in the same order. Received for {name}: "
                f"{self.worker(0)}: {chief.rpartition(' ')[0]}; "
                f"{self.worker(self.task)}: {mine.rpartition(' ')[0]}."
            )
        data = self._receive(f"{key}/value")
        return tf.constant(np.frombuffer(data, array.dtype).reshape(array.shape), value.dtype)

    def share_random_state(self) -> None:
        """Gives all processes the random state of process 0, where nothing changes by it.

        Initial values, dropout and the order in which `fit` shuffles rows are then the same
        everywhere, also for a script that sets no seed.
        """
        mine = random_state()
        state = json.loads(self.from_chief(json.dumps(mine)))
        if state != mine:
            set_random_state(state)

    def wait_for(self, key: str, task: int, what: str, limit: float | None = None) -> str:
        """Returns a string of the table, with notices while it is not there.

        Args:
            key: its key.
            task: of the process that sets it.
            what: what that process has to do, for messages.
            limit: seconds to wait; None for no limit.

        Returns:
            The string.

        Raises:
            TimeoutError: it is not there within `limit`.
            RuntimeError: a process has ended.
        """
        start = notice = time.monotonic()
        while True:
            try:
                return _table().get_config_key_value(key, TURN)
            except tf.errors.DeadlineExceededError:
                lost = _internal.lost_workers(len(self.workers))
                if lost:
                    names = ", ".join(f"{task} ({self.workers[task]})" for task in lost)
                    raise RuntimeError(
                        f"This process waits for others, of which the workers {names} have ended "
                        "or do not answer any more. Look at what they printed last, and start the "
                        "job again."
                    ) from None
            now = time.monotonic()
            waited = f"{self.worker(self.task)} has waited {now - start:.0f} seconds for "
            waited += self.worker(task) + (f" to {what}" if what else "")
            if limit is not None and now - start > limit:
                raise TimeoutError(
                    f"{waited}. All workers run the same script on the same data. Look at what it "
                    "does; if it only needs longer, raise collective_timeout=."
                )
            if now - notice > NOTICE:
                notice = now
                _log.warning("%s.", waited)

    def _key(self) -> str:
        return f"llmos_tf/{self.name}/{next(self._calls)}"

    def _send(self, key: str, array: np.ndarray, receivers: list[int]) -> None:
        """Sends what `_receive` returns, and takes it out of the table again."""
        text = base64.b64encode(array.tobytes()).decode()
        starts = range(0, len(text), _CHUNK)
        for i, start in enumerate(starts):
            _table().set_config_key_value(f"{key}/{i}", text[start : start + _CHUNK])
        _table().set_config_key_value(key, str(len(starts)))
        for task in receivers:
            self.wait_for(f"{key}/received/{task}", task, "receive a value")
        for i in range(len(starts)):
            _table().delete_config_key_value(f"{key}/{i}")

    def _receive(self, key: str) -> bytes:
        count = int(self.wait_for(key, 0, "send a value"))
        chunks = [self.wait_for(f"{key}/{i}", 0, "send a value") for i in range(count)]
        _table().set_config_key_value(f"{key}/received/{self.task}", "")
        return base64.b64decode("".join(chunks))


def _table() -> Any:
    """What has the table of strings."""
    return _internal.eager_context.context()
