"""Where a model is cut into parts: by cost, with as little as possible to send."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from llmos_tf.graph.op_costs import cost_of, elements
from llmos_tf.planning.schedules import Schedule
from llmos_tf.strategies.pipeline.microbatch_trace import Unit

# An element that is sent takes as long as so many operations of a matrix product.
_PER_ELEMENT_SENT = 100


@dataclass(frozen=True)
class Costs:
    """What the units of a model cost, and what would be sent where it is cut.

    Args:
        work: of each unit, and of what follows it before the next one.
        crossing: elements that are sent where the model is cut before each unit.
    """

    work: tuple[float, ...]
    crossing: tuple[float, ...]


def count_costs(graph: tf.Graph, units: Sequence[Unit], free: set[str]) -> Costs:
    """Counts costs in the graph of a forward pass of one row.

    Args:
        graph: of the trace.
        units: in it.
        free: names of ops whose results every part computes by itself.

    Returns:
        The costs, by unit.
    """
    begins = [unit.begin for unit in units]
    begins[0] = 0
    unit_of: dict[str, int] = {}
    work = [0.0] * len(units)
    crossing = [0.0] * len(units)
    last_use: dict[str, int] = {}
    operations = graph.get_operations()
    unit = 0
    for index, op in enumerate(operations):
        while unit + 1 < len(units) and index >= begins[unit + 1]:
            unit += 1
        unit_of[op.name] = unit
        for x in op.inputs:
            last_use[x.name] = unit
        if op.name not in free and op.type != "Placeholder":
            work[unit] += cost_of(op)
    for op in operations:
        if op.name in free or op.type == "Placeholder":
            continue
        for x in op.outputs:
            for k in range(unit_of[op.name] + 1, last_use.get(x.name, 0) + 1):
                crossing[k] += elements(x)
    return Costs(tuple(work), tuple(crossing))


def cut_by_cost(
    units: Sequence[Unit], costs: Costs, schedule: Schedule, stage_of: Mapping[str, int]
) -> tuple[int, ...]:
    """Cuts a model such that the most expensive part is as cheap as possible.

    By dynamic programming over the units, which are a sequence.

    Args:
        units: the calls of layers in a forward pass.
        costs: of the units.
        schedule: says how many parts there are and which stage has which.
        stage_of: layer or model name to stage, for those that the user has placed.

    Returns:
        For each part the index of its first unit, ascending from 0.

    Raises:
        ValueError: fewer layers with weights than parts, a name that is no layer, or stages that no
            cut can give.
    """  # noqa: DOC502
    _check_enough(units, schedule)
    wanted = _wanted_stages(units, stage_of, schedule)
    count, parts = len(units), schedule.num_parts
    # best[p][i]: least possible maximum over parts 0 to p, where part p ends before unit i.
    best = [[math.inf] * (count + 1) for _ in range(parts)]
    begin_of = [[0] * (count + 1) for _ in range(parts)]
    for part in range(parts):
        stage = schedule.stage_of_part(part)
        for begin in range(count):
            before = (0.0 if begin == 0 else math.inf) if part == 0 else best[part - 1][begin]
            if math.isinf(before):
                continue
            work = _PER_ELEMENT_SENT * costs.crossing[begin] if begin else 0.0
            has_weights = False
            for end in range(begin + 1, count + 1):
                if wanted[end - 1] not in (None, stage):
                    break
                work += costs.work[end - 1]
                has_weights = has_weights or units[end - 1].has_weights
                sent = _PER_ELEMENT_SENT * costs.crossing[end] if end < count else 0.0
                cost = max(before, work + sent)
                if has_weights and cost < best[part][end]:
                    best[part][end], begin_of[part][end] = cost, begin
    if math.isinf(best[-1][count]):
        raise ValueError(
            f"stage_of={dict(stage_of)} leaves no way to cut the model into {parts} parts in the "
            "order of its layers, each with weights. The layers are called in the order "
            f"{', '.join(dict.fromkeys(unit.name for unit in units))}; stages follow each other in "
            "that order."
        )
    begins, end = [], count
    for part in reversed(range(parts)):
        end = begin_of[part][end]
        begins.append(end)
    return tuple(reversed(begins))


def _check_enough(units: Sequence[Unit], schedule: Schedule) -> None:
    with_weights = [unit.name for unit in units if unit.has_weights]
    if len(with_weights) < schedule.num_parts:
        raise ValueError(
            f"A pipeline of {schedule.num_stages} stages with {schedule.num_chunks} chunk(s) each "
            f"cuts a model into {schedule.num_parts} parts, and this one has "
            f"{len(with_weights)} layer(s) with weights to put there: "
            f"{', '.join(with_weights) or 'none'}. Take a smaller pipe axis, or build the model of "
            "more layers: what one layer or block holds inside is not cut."
        )


def _wanted_stages(
    units: Sequence[Unit], stage_of: Mapping[str, int], schedule: Schedule
) -> list[int | None]:
    """For each unit the stage that the user wants, or None."""
    names = {name for unit in units for name in (unit.name, *unit.models)}
    for name, stage in stage_of.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or sorted(names)[:5]
            raise ValueError(
                f"stage_of names the layer {name!r}, which the model does not call. The nearest "
                f"names are {', '.join(near)}."
            )
        if not isinstance(stage, int) or not 0 <= stage < schedule.num_stages:
            raise ValueError(
                f"stage_of puts {name!r} on the stage {stage!r}; the stages are 0 to "
                f"{schedule.num_stages - 1}."
            )
    # The innermost name that is given counts.
    return [
        next((stage_of[n] for n in (unit.name, *reversed(unit.models)) if n in stage_of), None)
        for unit in units
    ]
