"""The published formulas of pipeline bubbles. No TensorFlow."""

from typing import NamedTuple

from llmos_tf.planning.schedules import Schedule


class Bubble(NamedTuple):
    """A formula and its value.

    Args:
        formula: in p stages, m microbatches and v chunks.
        share: its value, as `Schedule.bubble_share`.
    """

    formula: str
    share: float


def published_bubble(schedule: Schedule) -> Bubble | None:
    """Returns what the share of the bubble is by formula.

    Args:
        schedule: one that `make_schedule` made, or another one.

    Returns:
        The formula and its value; None for a schedule that is not a published one.

    Reference:
        Narayanan et al. (arXiv 2104.04473), section 2.2, over the time without a bubble: (p-1)/m
        and (p-1)/(vm). Qi et al. (arXiv 2401.10241), table 2.
    """
    p, m, v = schedule.num_stages, schedule.num_microbatches, schedule.num_chunks
    if schedule.name in ("gpipe", "1f1b"):
        return Bubble("(p-1)/(m+p-1)", (p - 1) / (m + p - 1))
    if schedule.name == "interleaved":
        return Bubble("(p-1)/(vm+p-1)", (p - 1) / (v * m + p - 1))
    needed = {"zb-h1": p, "zb-v": 2 * p - 1}
    if schedule.name not in needed:
        return None
    if m < needed[schedule.name]:
        return Bubble("(2p-1-m)/(2m+2p-1)", (2 * p - 1 - m) / (2 * m + 2 * p - 1))
    if schedule.name == "zb-h1":
        return Bubble("(p-1)/(3m+p-1)", (p - 1) / (3 * m + p - 1))
    return Bubble("0, as m >= 2p-1,", 0.0)
