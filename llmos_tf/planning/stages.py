"""Which stage of a pipeline has which part of a model, by its sizes alone."""

import math
from collections.abc import Sequence
from typing import Any

from llmos_tf.planning.schedules import Schedule

# As for `strategies.pipeline.partition`: an element that is read and written takes as long as so
# many operations of a matrix product.
PER_ELEMENT = 30


def stages_of_units(
    units: Sequence[Any], work: Sequence[float], schedule: Schedule
) -> list[list[Any]]:
    """Deals a sequence of units to stages such that the most expensive part is cheapest.

    Args:
        units: in the order of the model; the first and the last may not be parts by themselves.
        work: of each.
        schedule: says how many parts there are and which stage has which.

    Returns:
        For each stage its units, in order.

    Raises:
        ValueError: fewer units than parts.
    """
    count, parts = len(units), schedule.num_parts
    if count < parts:
        raise ValueError(
            f"A pipeline of {parts} parts needs as many layers. Received: a model of {count}, "
            "embeddings and the last norm counted."
        )
    # best[p][i]: the least maximum over the first p parts, which end before unit i.
    best = [[math.inf] * (count + 1) for _ in range(parts + 1)]
    begin_of = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for part in range(1, parts + 1):
        for begin in range(count):
            for end in range(begin + 1, count + 1):
                cost = max(best[part - 1][begin], sum(work[begin:end]))
                if cost < best[part][end]:
                    best[part][end], begin_of[part][end] = cost, begin
    stages: list[list[Any]] = [[] for _ in range(schedule.num_stages)]
    end = count
    for part in reversed(range(parts)):
        begin = begin_of[part + 1][end]
        stage = schedule.stage_of_part(part)
        stages[stage] = [*units[begin:end], *stages[stage]]
        end = begin
    return stages
