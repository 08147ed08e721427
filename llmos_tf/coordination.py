"""What the processes of a cluster tell each other outside of programs.

TensorFlow's coordination service, which `devices.connect_workers` starts, keeps a table of strings
that all processes read, and notices a process that has died. Waiting is done in short turns, so
that Ctrl-C ends it and a dead process is reported instead of waited for.
"""

import itertools
import json
import random
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from llmos_tf import _internal

# Milliseconds between looks at whether everybody is alive.
TURN = 2000


class Agreement:
    """A line between the processes of a cluster, each of which makes the same calls in order.

    Args:
        name: the same in all processes, and another one for each line.
    """

    def __init__(self, name: str):
        self._name = name
        self._calls = itertools.count()
        self._workers, self._task = _internal.connected_cluster()

    @property
    def is_chief(self) -> bool:
        """Whether this is process 0, which writes files and whose random state all take."""
        return self._task == 0

    def from_chief(self, value: str) -> str:
        """Returns the value of process 0, in every process.

        Args:
            value: what process 0 says; others' does not matter.

        Returns:
            It.
        """
        key = self._key()
        if self.is_chief:
            _internal.eager_context.context().set_config_key_value(key, value)
        return self._wait_for(key)

    def from_all(self, value: str) -> list[str]:
        """Returns the values of all processes, and so waits for all.

        Args:
            value: what this process says.

        Returns:
            A value for each process, in order.
        """
        key = self._key()
        _internal.eager_context.context().set_config_key_value(f"{key}/{self._task}", value)
        return [self._wait_for(f"{key}/{task}") for task in range(len(self._workers))]

    def require_same(self, what: str, value: str) -> None:
        """Checks that all processes have the same value.

        Args:
            what: names it in the error.
            value: this process's.

        Raises:
            ValueError: they differ.
        """
        values = self.from_all(value)
        if len(set(values)) > 1:
            table = "; ".join(
                f"worker {task} ({address}): {one}"
                for task, (address, one) in enumerate(zip(self._workers, values, strict=True))
            )
            raise ValueError(
                f"All workers run the same script with the same {what}. Received: {table}."
            )

    def share_random_state(self) -> None:
        """Gives all processes the random state of process 0, where nothing changes by it.

        Initial values, dropout and the order in which `fit` shuffles rows are then the same
        everywhere, also for a script that sets no seed.
        """
        mine = _random_state()
        state = json.loads(self.from_chief(json.dumps(mine)))
        if state != mine:
            _set_random_state(state)

    def _key(self) -> str:
        return f"llmos_tf/{self._name}/{next(self._calls)}"

    def _wait_for(self, key: str) -> str:
        context = _internal.eager_context.context()
        while True:
            try:
                return context.get_config_key_value(key, TURN)
            except tf.errors.DeadlineExceededError:
                self._check_alive()

    def _check_alive(self) -> None:
        lost = _internal.lost_workers(len(self._workers))
        if lost:
            names = ", ".join(f"{task} ({self._workers[task]})" for task in lost)
            raise RuntimeError(
                f"This process waits for others, of which the workers {names} have ended or do "
                "not answer any more. Look at what they printed last, and start the job again."
            )


def _random_state() -> dict[str, Any]:
    """The states of the generators that Keras, numpy and TensorFlow draw from by default."""
    if _internal.eager_context.global_seed() is None:
        # Without a seed TensorFlow draws one for each op, which no other process could draw.
        tf.random.set_seed(random.SystemRandom().getrandbits(31))
    kind, keys, *rest = np.random.get_state()
    return {
        "keras": _internal.keras_random_seed(),
        "python": _as_lists(random.getstate()),
        "numpy": [kind, keys.tolist(), *rest],
        "tensorflow": _internal.eager_context.global_seed(),
        "ops": _as_lists(_internal.op_seeds().getstate()),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    if state["keras"] not in (None, _internal.keras_random_seed()):
        keras.utils.set_random_seed(state["keras"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    tf.random.set_seed(state["tensorflow"])
    version, words, gauss = state["ops"]
    _internal.op_seeds().setstate((version, tuple(words), gauss))


def _as_lists(state: tuple) -> list:
    """The state of a `random.Random`, as it comes back from JSON."""
    version, words, gauss = state
    return [version, list(words), gauss]
