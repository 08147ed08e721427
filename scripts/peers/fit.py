"""Steps of `model.fit`, timed from the end of one to the end of the next."""

import time
from collections.abc import Callable
from typing import Any

import keras

from llmos_tf.scripts.peers.timing import TakeSteps


def fit_steps(model: keras.Model, data: Callable[[int], dict[str, Any]]) -> TakeSteps:
    """Makes a function that takes steps by one `fit`.

    Args:
        model: a compiled model.
        data: what `fit` is to be given for so many steps.

    Returns:
        A function of the number of steps. The first of them counts from the call of `fit`.
    """

    def take(count: int) -> tuple[list[float], list[float]]:
        timer = _Timer()
        model.fit(**data(count), epochs=1, shuffle=False, verbose=0, callbacks=[timer])
        return timer.times, timer.losses

    return take


class _Timer(keras.callbacks.Callback):
    """Notes each step. It reads the loss, as a progress bar would, so a step has ended by then."""

    def __init__(self):
        super().__init__()
        self.times: list[float] = []
        self.losses: list[float] = []
        self._last = time.perf_counter()
        self._sum = 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        # What is logged is the mean over the epoch so far.
        total = float(logs["loss"]) * (batch + 1)
        self.losses.append(total - self._sum)
        self._sum = total
        now = time.perf_counter()
        self.times.append(now - self._last)
        self._last = now
