"""Pipeline schedules as plain data: what each stage does in each tick. No TensorFlow.

A model is cut into *parts*, and a *stage*, a position on the axis `pipe`, has one or more of them:
its *chunks*. A batch is cut into *microbatches*. A schedule says in which order a stage takes the
forward and backward passes of its chunks with the microbatches; the executor runs it and the
planner draws it from the same object.

Letters in formulas: p stages, s a stage, m microbatches, v chunks on a stage.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from llmos_tf.planning.schedule_orders import ORDERS, Turn

# Chunks of a stage where the schedule has its own number; None: the user gives it.
_CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": None, "zb-h1": 1, "zb-v": 2}
SCHEDULES = tuple(_CHUNKS)


class Op(NamedTuple):
    """What a stage does in a tick.

    Args:
        kind: "F" forward, "B" backward, "W" gradient of weights. Where a schedule has W, its B is
            the gradient of inputs only; elsewhere B is the whole backward pass.
        microbatch: from 0.
        chunk: of the stage, from 0.
    """

    kind: str
    microbatch: int
    chunk: int


# An op seen from the model: (kind, microbatch, part).
Task = tuple[str, int, int]


@dataclass(frozen=True)
class Schedule:
    """The order of work of a pipeline, checked when it is made.

    Part k follows part k - 1. Stage s has part ``chunk · p + s``, or, where the schedule is folded,
    part s and part ``2p - 1 - s``: the parts go down the stages and up again.

    Args:
        name: for messages and pictures.
        num_stages: p, size of the axis `pipe`.
        num_microbatches: m, parts of a rank's batch.
        num_chunks: v, parts of the model on a stage.
        rows: ``rows[tick][stage]`` is the op of a stage in a tick, or None.
        folded: two chunks, the second in reverse order of the stages.

    Raises:
        ValueError: an op is missing, stands twice, or comes before what it needs: F of a part
            needs F of the part before it, B needs F of its part and B of the part after it, W needs
            B, all of the same microbatch in an earlier tick.

    Example:
        >>> schedule = make_schedule("1f1b", num_stages=2, num_microbatches=2)
        >>> [op.kind + str(op.microbatch) for op in schedule.order(0)]
        ['F0', 'F1', 'B0', 'B1']
        >>> schedule.bubble_share == 1 / 3
        True
    """

    name: str
    num_stages: int
    num_microbatches: int
    num_chunks: int
    rows: tuple[tuple[Op | None, ...], ...]
    folded: bool = False

    def __post_init__(self):
        for field in ("num_stages", "num_microbatches", "num_chunks"):
            _check_size(field, getattr(self, field))
        if self.folded and self.num_chunks != 2:
            raise ValueError(
                f"A folded schedule has two chunks on a stage. Received: {self.num_chunks}."
            )
        # Past the frozen dataclass: lists become tuples, so that a schedule can be hashed.
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        _check_rows(self)

    @property
    def splits_backward(self) -> bool:
        """Whether B is only the gradient of inputs, and W that of weights."""
        return any(isinstance(op, Op) and op.kind == "W" for row in self.rows for op in row)

    @property
    def num_parts(self) -> int:
        """Number of parts that the model is cut into: p · v."""
        return self.num_stages * self.num_chunks

    def part_of(self, stage: int, chunk: int) -> int:
        """Returns the part of the model that is a chunk of a stage.

        Args:
            stage: in ``range(num_stages)``.
            chunk: in ``range(num_chunks)``.

        Returns:
            A part, from 0 at the input of the model.
        """
        return _part_of(self.num_stages, self.folded, stage, chunk)

    def stage_of_part(self, part: int) -> int:
        """Returns the stage that has a part of the model.

        Args:
            part: in ``range(num_parts)``.

        Returns:
            A stage.
        """
        if self.folded and part >= self.num_stages:
            return self.num_parts - 1 - part
        return part % self.num_stages

    def order(self, stage: int) -> tuple[Op, ...]:
        """Returns what a stage does, without the ticks in which it waits.

        Args:
            stage: in ``range(num_stages)``.

        Returns:
            Its ops, first to last.
        """
        return tuple(row[stage] for row in self.rows if row[stage] is not None)

    @property
    def bubble_share(self) -> float:
        """Share of its span in which the stage with the longest span waits, from 0 to 1.

        A stage's span is from its first to its last op, in ticks. What is before and after it is no
        bubble: there the stage can end the step before and begin the next one. Where all stages
        wait for each other between steps, the time of a step is that of
        `llmos_tf.planning.simulate`.

        Reference:
            Qi et al., Zero bubble pipeline parallelism (arXiv 2401.10241).
        """
        busy = [[t for t, row in enumerate(self.rows) if row[s]] for s in range(self.num_stages)]
        return 1 - len(busy[0]) / max(ticks[-1] - ticks[0] + 1 for ticks in busy)

    @property
    def peak_live_activations(self) -> tuple[int, ...]:
        """Most activations that each stage holds at once, in those of a part for a microbatch.

        F makes them, and the last op of the same part and microbatch frees them: B, or W where the
        backward pass is split.
        """
        change = {"F": 1, "B": 0, "W": -1} if self.splits_backward else {"F": 1, "B": -1}
        peaks = []
        for stage in range(self.num_stages):
            live = peak = 0
            for op in self.order(stage):
                live += change[op.kind]
                peak = max(peak, live)
            peaks.append(peak)
        return tuple(peaks)


def make_schedule(
    name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> Schedule:
    """Makes one of the published schedules.

    ============  =======  ==================  =======================  =====================
    name          where    bubble share        live parts on stage s    source
    ============  =======  ==================  =======================  =====================
    gpipe                  (p-1)/(m+p-1)       m                        arXiv 1811.06965
    1f1b                   (p-1)/(m+p-1)       min(p-s, m)              arXiv 2104.04473
    interleaved            (p-1)/(vm+p-1)      min(vp+p-2s-1, vm)       arXiv 2104.04473
    zb-h1         m>=p     (p-1)/(3m+p-1)      at most p                arXiv 2401.10241
    zb-v          m>=2p-1  0                   at most 2p               arXiv 2401.10241
    zb-h1, zb-v   fewer    (2p-1-m)/(2m+2p-1)  as above
    ============  =======  ==================  =======================  =====================

    A part is a v-th of a stage: zb-v holds no more than 1f1b holds on stage 0. With fewer
    microbatches than their papers suppose, the last two fill what they can.

    Args:
        name: of `SCHEDULES`.
        num_stages: p, at least 2.
        num_microbatches: m; a multiple of p for "interleaved".
        num_chunks: v, for "interleaved" at least 2. The others have their own number, 2 for "zb-v"
            and 1 for the rest, and take it or 1.

    Returns:
        The schedule, each op in the earliest tick that the order on its stage allows.

    Raises:
        ValueError: an unknown name, or numbers that the schedule does not take.

    Example:
        >>> make_schedule("zb-v", num_stages=4, num_microbatches=8).bubble_share
        0.0
    """
    if name not in _CHUNKS:
        raise ValueError(f"The schedules are {', '.join(SCHEDULES)}. Received: {name!r}.")
    _check_size("num_stages", num_stages)
    _check_size("num_microbatches", num_microbatches)
    _check_size("num_chunks", num_chunks)
    if num_stages < 2:
        raise ValueError(
            "A pipeline has at least 2 stages. Received: num_stages=1. Without a pipeline there is "
            "no schedule to choose."
        )
    num_chunks = _resolve_chunks(name, num_stages, num_microbatches, num_chunks)
    folded = name == "zb-v"
    orders = [
        _numbered(ORDERS[name](num_stages, stage, num_microbatches, num_chunks), num_microbatches)
        for stage in range(num_stages)
    ]
    rows = _earliest_rows(orders, num_chunks, folded)
    return Schedule(name, num_stages, num_microbatches, num_chunks, rows, folded)


def needs(task: Task, num_parts: int) -> list[Task]:
    """Returns what a task comes after.

    Args:
        task: (kind, microbatch, part).
        num_parts: of the model.

    Returns:
        Tasks whose results it takes.
    """
    kind, microbatch, part = task
    if kind == "F":
        return [("F", microbatch, part - 1)] if part > 0 else []
    if kind == "W":
        return [("B", microbatch, part)]
    after = [("B", microbatch, part + 1)] if part < num_parts - 1 else []
    return [("F", microbatch, part), *after]


def _part_of(num_stages: int, folded: bool, stage: int, chunk: int) -> int:
    if folded and chunk == 1:
        return 2 * num_stages - 1 - stage
    return chunk * num_stages + stage


def _check_size(name: str, value: int) -> None:
    # bool is an int in Python, and True stages are a mistake.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` is a positive integer. Received: {name}={value!r}.")


def _check_rows(schedule: Schedule) -> None:
    """Finds the first op that cannot be where it is, then the first that is missing."""
    expected = [
        (kind, microbatch, part)
        for kind in ("FBW" if schedule.splits_backward else "FB")
        for microbatch in range(schedule.num_microbatches)
        for part in range(schedule.num_parts)
    ]
    known, done = frozenset(expected), set()
    for tick, row in enumerate(schedule.rows):
        where = f"in tick {tick} of the schedule {schedule.name!r}"
        if len(row) != schedule.num_stages:
            raise ValueError(
                f"A row has an op or None for each of {schedule.num_stages} stages. "
                f"Received: {row!r} {where}."
            )
        tasks = [
            _checked_task(schedule, stage, op, known, done, where)
            for stage, op in enumerate(row)
            if op is not None
        ]
        # Only now: what the stages do in a tick they do at the same time.
        done.update(tasks)
    for task in expected:
        if task not in done:
            raise ValueError(
                f"{_described(task)}, of stage {schedule.stage_of_part(task[2])}, is missing in "
                f"the schedule {schedule.name!r}."
            )


def _checked_task(
    schedule: Schedule, stage: int, op: Op, known: Set[Task], done: Set[Task], where: str
) -> Task:
    where = f"on stage {stage} {where}"
    is_op = isinstance(op, Op) and op.chunk in range(schedule.num_chunks)
    task = (op.kind, op.microbatch, schedule.part_of(stage, op.chunk)) if is_op else None
    if task not in known:
        raise ValueError(
            f"An entry is None or an Op: F, B, and W on all stages or none, of microbatches 0 to "
            f"{schedule.num_microbatches - 1} and chunks 0 to {schedule.num_chunks - 1}. "
            f"Received: {op!r} {where}."
        )
    if task in done:
        raise ValueError(f"{_described(task)} stands a second time, {where}.")
    for need in needs(task, schedule.num_parts):
        if need not in done:
            raise ValueError(
                f"{_described(task)} comes too early {where}: it needs {_described(need)} in an "
                "earlier tick."
            )
    return task


def _described(task: Task) -> str:
    kind, microbatch, part = task
    return f"{kind} of part {part} with microbatch {microbatch}"


def _earliest_rows(
    orders: Sequence[Sequence[Op]], num_chunks: int, folded: bool
) -> tuple[tuple[Op | None, ...], ...]:
    """Puts each op in the earliest tick that its stage's order and its needs allow."""
    num_stages = len(orders)
    queues = [deque(order) for order in orders]
    done: set[Task] = set()
    rows = []
    while any(queues):
        row: list[Op | None] = [None] * num_stages
        tasks = []
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            op = queue[0]
            task = (op.kind, op.microbatch, _part_of(num_stages, folded, stage, op.chunk))
            if done.issuperset(needs(task, num_stages * num_chunks)):
                row[stage] = queue.popleft()
                tasks.append(task)
        if not tasks:
            # The orders wait for each other; the schedule's own check says for what.
            break
        done.update(tasks)
        rows.append(tuple(row))
    return tuple(rows)


def _resolve_chunks(name: str, num_stages: int, num_microbatches: int, num_chunks: int) -> int:
    own = _CHUNKS[name]
    if own is not None:
        if num_chunks not in (1, own):
            raise ValueError(
                f"The schedule {name!r} has {own} chunks on a stage. Received: "
                f"num_chunks={num_chunks}. Leave it out, or take 'interleaved'."
            )
        return own
    if num_chunks < 2:
        raise ValueError(
            "The schedule 'interleaved' needs at least 2 chunks on a stage. Received: "
            f"num_chunks={num_chunks}. With one it is '1f1b'."
        )
    if num_microbatches % num_stages:
        raise ValueError(
            "The schedule 'interleaved' takes the microbatches in groups of as many as there are "
            f"stages. Received: num_microbatches={num_microbatches}, which is not a multiple of "
            f"num_stages={num_stages}."
        )
    return num_chunks


def _numbered(turns: Iterable[Turn], num_microbatches: int) -> list[Op]:
    """Gives each turn the next microbatch of its kind and chunk; leaves out what is beyond m."""
    taken: Counter[Turn] = Counter()
    ops = []
    for turn in turns:
        if taken[turn] < num_microbatches:
            ops.append(Op(turn[0], taken[turn], turn[1]))
        taken[turn] += 1
    return ops
