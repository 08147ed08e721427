"""Schedules: the published figures hold, and an order that cannot run is refused."""

import ast
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_tf.planning import schedule_orders, schedules
from llmos_tf.planning.schedules import SCHEDULES, Op, Schedule, make_schedule, needs

pytestmark = pytest.mark.fast


@st.composite
def sizes(draw, names=SCHEDULES):
    """Arguments of make_schedule."""
    name, stages = draw(st.sampled_from(names)), draw(st.integers(2, 8))
    if name == "interleaved":
        groups, chunks = draw(st.integers(1, 4)), draw(st.integers(2, 4))
        return name, stages, groups * stages, chunks
    return name, stages, draw(st.integers(1, 4 * stages)), 1


def share(bubble, work):
    return bubble / (work + bubble)


def published_share(name, p, m, v):
    """What a stage waits over its span, in forward passes of a part."""
    if name in ("zb-h1", "zb-v"):
        # With 2p - 1 microbatches zb-v waits no more, and with p zb-h1 waits as its paper says.
        waits = 2 * p - 1 - m if m < p else {"zb-h1": p - 1, "zb-v": max(2 * p - 1 - m, 0)}[name]
        return share(waits, 3 * m) if name == "zb-h1" else share(2 * waits, 6 * m)
    return share(p - 1, v * m)


@given(sizes())
def test_bubble_is_the_published_one(arguments):
    """Fails if a stage takes its passes in another order than that of the paper."""
    assert make_schedule(*arguments).bubble_share == pytest.approx(
        published_share(*arguments), abs=1e-12
    )


@given(sizes())
def test_activations_are_the_published_ones(arguments):
    """Fails for a longer warm-up than needed, or a W that frees its activations too late."""
    name, p, m, v = arguments
    peaks = make_schedule(*arguments).peak_live_activations
    exact = {
        "gpipe": [m] * p,
        "1f1b": [min(p - s, m) for s in range(p)],
        "interleaved": [min(v * p + p - 2 * s - 1, v * m) for s in range(p)],
    }
    if name in exact:
        assert list(peaks) == exact[name]
    else:
        # Halves of a stage in zb-v: on each stage no more than 1f1b holds on the first.
        assert max(peaks) <= {"zb-h1": 1, "zb-v": 2}[name] * min(p, m)


@given(sizes())
def test_every_op_once_and_after_what_it_needs(arguments):
    """Fails if an op is lost, doubled, or before what it needs, and the check is blind to it."""
    schedule = make_schedule(*arguments)
    tick_of = {}
    for tick, row in enumerate(schedule.rows):
        for stage, op in enumerate(row):
            if op is not None:
                task = (op.kind, op.microbatch, schedule.part_of(stage, op.chunk))
                assert tick_of.setdefault(task, tick) == tick
    kinds = "FBW" if schedule.splits_backward else "FB"
    assert schedule.splits_backward == schedule.name.startswith("zb")
    assert len(tick_of) == len(kinds) * schedule.num_microbatches * schedule.num_parts
    for (kind, m, part), tick in tick_of.items():
        if part > 0:
            assert tick_of["F", m, part - 1] < tick_of["F", m, part]
            assert tick_of["B", m, part] < tick_of["B", m, part - 1]
        assert tick_of["F", m, part] < tick_of["B", m, part]
        if kind == "W":
            assert tick_of["B", m, part] < tick


@given(sizes())
def test_parts_and_stages(arguments):
    """Fails if a stage looks for the weights of a part that is elsewhere."""
    schedule = make_schedule(*arguments)
    p, v = schedule.num_stages, schedule.num_chunks
    parts = {schedule.part_of(s, c): s for s in range(p) for c in range(v)}
    assert sorted(parts) == list(range(schedule.num_parts))
    assert all(schedule.stage_of_part(part) == stage for part, stage in parts.items())
    if schedule.name == "zb-v":
        # The loss is on the stage that has the embedding.
        assert parts[0] == parts[schedule.num_parts - 1] == 0
    else:
        assert all(stage == part % p for part, stage in parts.items())


@given(sizes(), st.data())
def test_an_op_too_early_is_refused(arguments, data):
    """Fails if the check lets an op run in the tick of what it needs, or before it."""
    schedule = make_schedule(*arguments)
    rows = [list(row) for row in schedule.rows]
    at = {
        (op.kind, op.microbatch, schedule.part_of(stage, op.chunk)): (tick, stage)
        for tick, row in enumerate(rows)
        for stage, op in enumerate(row)
        if op
    }
    task = data.draw(st.sampled_from([t for t in at if needs(t, schedule.num_parts)]))
    need = data.draw(st.sampled_from(needs(task, schedule.num_parts)))
    (tick, stage), (needed, _) = at[task], at[need]
    early = data.draw(st.integers(0, needed))
    # In place of what is there: the first thing that is wrong is the op that came too early, or
    # another op that misses the one that it replaced.
    rows[early][stage], rows[tick][stage] = rows[tick][stage], rows[early][stage]
    with pytest.raises(ValueError, match="comes too early on stage"):
        dataclasses.replace(schedule, rows=rows)


@given(sizes(), st.data())
def test_an_op_that_is_missing_or_doubled_is_refused(arguments, data):
    """Fails if a microbatch may be lost, or its gradient be added twice."""
    schedule = make_schedule(*arguments)
    rows = [list(row) for row in schedule.rows]
    places = [(t, s) for t, row in enumerate(rows) for s, op in enumerate(row) if op]
    tick, stage = data.draw(st.sampled_from(places))
    op = rows[tick][stage]
    row = [None] * schedule.num_stages
    row[stage] = op
    with pytest.raises(ValueError, match=f"{op.kind} of part .* stands a second time, on stage"):
        dataclasses.replace(schedule, rows=[*rows, row])
    rows[tick][stage] = None
    with pytest.raises(ValueError, match=r"comes too early|is missing"):
        dataclasses.replace(schedule, rows=rows)


ROWS = make_schedule("1f1b", 2, 2).rows


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": [row[::-1] for row in ROWS]}, "F of part 1 with microbatch 0 comes too early"),
        ({"rows": [row[:1] for row in ROWS]}, "an op or None for each of 2 stages"),
        ({"rows": ()}, "F of part 0 with microbatch 0, of stage 0, is missing"),
        ({"rows": ROWS[:-1]}, "B of part 0 with microbatch 1, of stage 0, is missing"),
        ({"rows": [[Op("F", 0, 1), None]]}, "Received: Op(kind='F', microbatch=0, chunk=1)"),
        ({"rows": [[Op("F", 2, 0), None]]}, "microbatches 0 to 1"),
        ({"rows": [[Op("C", 0, 0), None]]}, "Received: Op(kind='C'"),
        ({"rows": [["F0", None]]}, "Received: 'F0' on stage 0 in tick 0 of the schedule '1f1b'"),
        ({"num_chunks": 0}, "`num_chunks` is a positive integer. Received: num_chunks=0"),
        ({"folded": True}, "A folded schedule has two chunks"),
    ],
)
def test_a_broken_schedule_is_refused(changed, words):
    """Fails if a schedule made by hand runs into a hang or a wrong gradient, or the message does
    not say where to look."""
    with pytest.raises(ValueError, match=r"Received|missing|early") as error:
        dataclasses.replace(make_schedule("1f1b", 2, 2), **changed)
    assert words in str(error.value)


def test_w_on_one_stage_only_is_refused():
    """Fails if a stage whose B is only half of the work has no W, and weights without gradients."""
    schedule = make_schedule("zb-h1", 2, 2)
    rows = [
        [op if stage == 0 or (op and op.kind != "W") else None for stage, op in enumerate(row)]
        for row in schedule.rows
    ]
    with pytest.raises(ValueError, match="W of part 1 with microbatch 0, of stage 1, is missing"):
        dataclasses.replace(schedule, rows=rows)


def test_a_schedule_made_by_hand():
    """Fails if only the published ones are taken, or lists of rows make one that has no hash."""
    forward, backward = Op("F", 0, 0), Op("B", 0, 0)
    rows = [[forward, None], [None, forward], [None, backward], [backward, None]]
    schedule = Schedule("mine", 2, 1, 1, rows)
    assert hash(schedule) == hash(dataclasses.replace(make_schedule("1f1b", 2, 1), name="mine"))
    assert schedule.order(1) == (forward, backward)
    assert (schedule.bubble_share, schedule.peak_live_activations) == (0.5, (1, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.name = "yours"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("2f2b", 2, 2), "The schedules are gpipe, 1f1b, interleaved, zb-h1, zb-v. Received"),
        (("1f1b", 0, 2), "`num_stages` is a positive integer. Received: num_stages=0"),
        (("1f1b", 2, -1), "Received: num_microbatches=-1"),
        (("1f1b", 2, 2.0), "Received: num_microbatches=2.0"),
        (("1f1b", True, 2), "Received: num_stages=True"),
        (("interleaved", 2, 2, 0), "Received: num_chunks=0"),
        (("1f1b", 1, 2), "at least 2 stages. Received: num_stages=1"),
        (("interleaved", 2, 2), "at least 2 chunks on a stage. Received: num_chunks=1"),
        (("interleaved", 4, 6, 2), "num_microbatches=6, which is not a multiple of num_stages=4"),
        (("gpipe", 2, 2, 2), "has 1 chunks on a stage. Received: num_chunks=2"),
        (("zb-v", 2, 4, 3), "has 2 chunks on a stage. Received: num_chunks=3"),
    ],
)
def test_what_no_schedule_can_have(arguments, words):
    """Fails if wrong numbers give a schedule of something else, or a traceback from within."""
    with pytest.raises(ValueError, match="Received") as error:
        make_schedule(*arguments)
    assert words in str(error.value)


def test_zb_v_has_its_own_number_of_chunks():
    """Fails if the number that it has anyway may not be said."""
    assert make_schedule("zb-v", 2, 4) == make_schedule("zb-v", 2, 4, 2)


def test_the_orders_of_2104_04473():
    """Fails if 1F1B or its interleaved form differ from figures 3 and 4 of the paper."""
    one = "".join(op.kind + str(op.microbatch) for op in make_schedule("1f1b", 4, 8).order(2))
    assert one == "F0F1B0F2B1F3B2F4B3F5B4F6B5F7B6B7"
    two = make_schedule("interleaved", 4, 8, 2).order(0)
    text = " ".join(f"{op.kind}{op.microbatch}{'ab'[op.chunk]}" for op in two)
    assert text.startswith("F0a F1a F2a F3a F0b F1b F2b F3b F4a F5a F6a B0b F7a B1b F4b B2b")


@pytest.mark.parametrize("module", [schedules, schedule_orders])
def test_no_tensorflow(module):
    """Fails if a schedule can no longer be looked at without TensorFlow."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    found = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    outside = {"collections", "collections.abc", "dataclasses", "itertools", "typing"}
    assert found - outside <= {"llmos_tf.planning.schedule_orders"}
