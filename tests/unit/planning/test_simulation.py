"""The clock of a schedule: the time of a step is that of the formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_tf.planning import published_bubble, simulate
from llmos_tf.planning.schedules import Op, Schedule, make_schedule

pytestmark = pytest.mark.fast

# Quarters, halves and thirds of small numbers: sums are exact to a few units in the last place.
CLOSE = {"rel": 1e-12, "abs": 1e-12}
sizes = st.tuples(st.integers(2, 8), st.integers(1, 4))


@given(sizes, st.integers(2, 4))
def test_a_step_takes_what_the_formulas_say(size, chunks):
    """Fails if an op waits for something that it does not need, or a split backward pass takes the
    time of a whole one."""
    p, groups = size
    m = groups * p
    time = {
        name: simulate(make_schedule(name, p, m, chunks if name == "interleaved" else 1)).total_time
        for name in ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
    }
    # Forward, gradient of inputs and gradient of weights take a stage 1 each.
    assert time["gpipe"] == time["1f1b"] == 3 * (m + p - 1)
    assert time["interleaved"] == pytest.approx(3 * (m + (p - 1) / chunks), **CLOSE)
    # A third of the bubble, as W fills the rest.
    assert time["zb-h1"] == 3 * m + p - 1
    if m >= 2 * p - 1:
        # No stage waits; the last one starts p - 1 halves of a pass after the first.
        assert time["zb-v"] == 3 * m + (p - 1) / 2


@given(
    sizes,
    st.floats(0.1, 9),
    st.floats(0.1, 9),
    st.floats(0.1, 9),
)
def test_1f1b_with_any_durations(size, forward, backward, weight):
    """Fails if durations are mixed up."""
    p, m = size
    time = simulate(make_schedule("1f1b", p, m), forward, backward, weight).total_time
    assert time == pytest.approx((m + p - 1) * (forward + backward + weight), **CLOSE)


def test_transfers():
    """Fails if a transfer is left out, or one is paid inside a stage: of zb-v's four parts on two
    stages the second and third are on the same one."""
    one = make_schedule("zb-v", 2, 1)
    times = [simulate(one, 2, 2, 2, transfer).total_time for transfer in (0, 100)]
    assert times[1] - times[0] == 400
    starts, ends, _ = simulate(make_schedule("gpipe", 2, 1), 1, 1, 1, 0.5)
    assert (starts, ends) == (((0, 5.0), (1.5, 2.5)), ((1, 7.0), (2.5, 4.5)))


@given(sizes, st.integers(2, 4))
def test_interleaved_passes_hide_transfers(size, chunks):
    """Fails if stages have no pass to do while a microbatch is on its way: with a warm-up half as
    long, transfers are waited for at each turn."""
    p, groups = size
    schedule = make_schedule("interleaved", p, groups * p, chunks)
    # A pass of a chunk takes 1 forward and 2 backward.
    shorter, longer = (
        simulate(schedule, chunks, chunks, chunks, transfer).total_time for transfer in (0, 0.25)
    )
    # Those of one microbatch, down and up through all parts, however many there are.
    assert longer - shorter == pytest.approx(0.25 * 2 * (p * chunks - 1), **CLOSE)


def test_a_negative_duration_is_refused():
    """Fails if a clock may run backward."""
    with pytest.raises(ValueError, match=r"`weight` is a duration, 0 or more. Received: weight=-1"):
        simulate(make_schedule("1f1b", 2, 2), weight=-1)


def test_formulas_are_of_published_schedules():
    """Fails if a formula is shown for a schedule that it is not of."""
    formula, share = published_bubble(make_schedule("interleaved", 4, 8, 2))
    assert (formula, share) == ("(p-1)/(vm+p-1)", 3 / 19)
    rows = [[Op("F", 0, 0)], [Op("B", 0, 0)]]
    assert published_bubble(Schedule("mine", 1, 1, 1, rows)) is None


@given(st.sampled_from(["gpipe", "1f1b", "zb-h1", "zb-v"]), st.integers(2, 8), st.integers(1, 24))
def test_formulas_are_what_is_counted(name, stages, microbatches):
    """Fails if the formula that is shown beside the bubble is another one."""
    schedule = make_schedule(name, stages, microbatches)
    assert published_bubble(schedule).share == pytest.approx(schedule.bubble_share, **CLOSE)
