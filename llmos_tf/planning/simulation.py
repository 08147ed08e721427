"""A schedule on a clock: when each op runs, and how long a step takes. No TensorFlow."""

from typing import NamedTuple

from llmos_tf.planning.schedules import Schedule, Task, needs


class Timeline(NamedTuple):
    """When the ops of a schedule run, in the unit of the durations given to `simulate`.

    Args:
        starts: of each stage, the start of each op of ``order(stage)``.
        ends: of each stage, the end of each op of ``order(stage)``.
        total_time: from the first start to the last end.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    total_time: float


def simulate(
    schedule: Schedule,
    forward: float = 1.0,
    backward: float = 1.0,
    weight: float = 1.0,
    transfer: float = 0.0,
) -> Timeline:
    """Runs a schedule on a clock: every op starts as soon as its stage and its inputs are there.

    Args:
        schedule: what each stage does in which order.
        forward: time of a forward pass of a whole stage, all its chunks, with one microbatch.
        backward: time of the gradient of inputs, likewise.
        weight: time of the gradient of weights, likewise; a backward pass that is not split takes
            backward + weight.
        transfer: time from the end of an op until its result is on another stage. Transfers do not
            keep a stage from computing.

    Returns:
        The starts and ends of all ops, and the time of a step.

    Raises:
        ValueError: a duration is negative.

    Example:
        >>> simulate(make_schedule("1f1b", 4, 8)).total_time
        33.0
        >>> simulate(make_schedule("zb-h1", 4, 8)).total_time
        27.0
    """
    for name, value in (
        ("forward", forward),
        ("backward", backward),
        ("weight", weight),
        ("transfer", transfer),
    ):
        if not value >= 0:
            raise ValueError(f"`{name}` is a duration, 0 or more. Received: {name}={value!r}.")
    whole = backward if schedule.splits_backward else backward + weight
    duration = {"F": forward, "B": whole, "W": weight}
    ends: dict[Task, float] = {}
    times: list[list[tuple[float, float]]] = [[] for _ in range(schedule.num_stages)]
    # Tick by tick, what an op needs has been seen before it.
    for row in schedule.rows:
        for stage, op in enumerate(row):
            if op is None:
                continue
            task = (op.kind, op.microbatch, schedule.part_of(stage, op.chunk))
            start = times[stage][-1][1] if times[stage] else 0.0
            for need in needs(task, schedule.num_parts):
                moved = schedule.stage_of_part(need[2]) != stage
                start = max(start, ends[need] + transfer * moved)
            ends[task] = start + duration[op.kind] / schedule.num_chunks
            times[stage].append((start, ends[task]))
    return Timeline(
        tuple(tuple(start for start, _ in stage) for stage in times),
        tuple(tuple(end for _, end in stage) for stage in times),
        max(ends.values()),
    )
