"""How the steps of a run are timed."""

import time
from collections.abc import Callable

# Takes so many steps, and returns the seconds and the loss of each.
TakeSteps = Callable[[int], tuple[list[float], list[float]]]


def timed(step: Callable[[], float]) -> TakeSteps:
    """Makes a function that takes and times steps.

    Args:
        step: takes one step and returns its loss, as a number: by then all devices have done it.

    Returns:
        A function of the number of steps.
    """

    def take(count: int) -> tuple[list[float], list[float]]:
        times, losses = [], []
        for _ in range(count):
            begin = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - begin)
        return times, losses

    return take
