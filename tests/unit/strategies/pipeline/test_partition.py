"""Where a model is cut: never worse than anywhere else, and as the user says."""

import itertools
import math

import pytest
import tensorflow as tf
from hypothesis import assume, given
from hypothesis import strategies as st

from llmos_tf.planning.schedules import make_schedule
from llmos_tf.strategies.pipeline.microbatch_trace import Unit
from llmos_tf.strategies.pipeline.partition import Costs, count_costs, cut_by_cost

pytestmark = pytest.mark.fast

# As in the module: elements that are made, and that are sent, in operations of a product.
PER_ELEMENT, PER_ELEMENT_SENT = 30, 100
SCHEDULES = [
    make_schedule("1f1b", 2, 2),
    make_schedule("gpipe", 3, 3),
    make_schedule("zb-v", 2, 4),
    make_schedule("interleaved", 2, 2, 2),
]


def units_of(has_weights):
    """Units named u0, u1, …; those with weights have a placeholder for one."""
    return [
        Unit(f"u{i}", ("model",), i, ("w",) if has else ()) for i, has in enumerate(has_weights)
    ]


def cost_of(begins, costs, has_weights, schedule, stage_of):
    """Cost of the most expensive part of a cut, inf for one that is not allowed."""
    ends = [*begins[1:], len(costs.work)]
    worst = 0.0
    for part, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        stage = schedule.stage_of_part(part)
        wanted = [stage_of.get(f"u{i}", stage) for i in range(begin, end)]
        if not any(has_weights[begin:end]) or any(w != stage for w in wanted):
            return math.inf
        sent = costs.crossing[begin] if begin else 0.0
        sent += costs.crossing[end] if end < len(costs.work) else 0.0
        worst = max(worst, sum(costs.work[begin:end]) + PER_ELEMENT_SENT * sent)
    return worst


@st.composite
def models(draw):
    """A schedule, and a model of up to nine layers with some of them placed."""
    schedule = draw(st.sampled_from(SCHEDULES))
    count = draw(st.integers(schedule.num_parts, 9))
    has_weights = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    work = draw(st.lists(st.integers(0, 2000), min_size=count, max_size=count))
    crossing = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    placed = draw(
        st.dictionaries(
            st.integers(0, count - 1), st.integers(0, schedule.num_stages - 1), max_size=2
        )
    )
    stage_of = {f"u{i}": stage for i, stage in placed.items()}
    costs = Costs(tuple(map(float, work)), tuple(map(float, crossing)))
    return schedule, costs, has_weights, stage_of


@given(models())
def test_no_other_cut_is_better(model):
    """Fails for a cost that is forgotten, a part without weights, a layer on another stage than
    the user has said, or an error where there is a cut."""
    schedule, costs, has_weights, stage_of = model
    assume(sum(has_weights) >= schedule.num_parts)
    count = len(has_weights)
    best = min(
        cost_of((0, *cuts), costs, has_weights, schedule, stage_of)
        for cuts in itertools.combinations(range(1, count), schedule.num_parts - 1)
    )
    units = units_of(has_weights)
    if math.isinf(best):
        with pytest.raises(ValueError, match="no way to cut"):
            cut_by_cost(units, costs, schedule, stage_of)
        return
    begins = cut_by_cost(units, costs, schedule, stage_of)
    assert cost_of(begins, costs, has_weights, schedule, stage_of) == best


def test_a_name_of_a_model_counts_for_its_layers():
    """Fails if the innermost name that is given does not count."""
    schedule, costs = SCHEDULES[0], Costs((1.0,) * 4, (0.0,) * 4)
    units = [
        Unit("a", ("model", "body"), 0, ("w",)),
        Unit("b", ("model", "body"), 1, ("w",)),
        Unit("c", ("model", "body"), 2, ("w",)),
        Unit("d", ("model",), 3, ("w",)),
    ]
    assert cut_by_cost(units, costs, schedule, {}) == (0, 2)
    assert cut_by_cost(units, costs, schedule, {"body": 0}) == (0, 3)
    assert cut_by_cost(units, costs, schedule, {"body": 0, "c": 1}) == (0, 2)


@pytest.mark.parametrize(
    ("stage_of", "message"),
    [
        ({"u11": 1}, r"(?s)'u11'.*nearest names are u1"),
        ({"u0": 2}, r"'u0' on the stage 2; the stages are 0 to 1"),
        ({"u0": "first"}, "'first'"),
        ({"u1": 1, "u2": 0}, r"(?s)no way to cut.*u0, u1, u2"),
    ],
)
def test_places_that_do_not_fit(stage_of, message):
    """Fails if a wrong name, stage or order of stages is taken in silence, or not named."""
    units = units_of([True] * 3)
    with pytest.raises(ValueError, match=message):
        cut_by_cost(units, Costs((1.0,) * 3, (0.0,) * 3), SCHEDULES[0], stage_of)


def test_fewer_layers_than_parts():
    """Fails if the error does not say how many parts and how many layers there are."""
    units = units_of([True, False, True])
    with pytest.raises(ValueError, match=r"(?s)3 parts.*2 layer\(s\) with weights.*u0, u2"):
        cut_by_cost(units, Costs((1.0,) * 3, (0.0,) * 3), SCHEDULES[1], {})


def test_costs_are_operations_and_elements():
    """Fails if a product is not counted by its inner length, if what goes on to a later unit is not
    sent over each cut between, or if what every part has anyway is sent."""
    with tf.Graph().as_default() as graph:
        x, w1, w2 = (tf.compat.v1.placeholder(tf.float32, s) for s in ([1, 8], [8, 16], [16, 4]))
        mask = tf.cast(x > 0, tf.float32)
        begins = [graph.version]
        a = tf.matmul(x, w1)
        begins.append(graph.version)
        b = tf.nn.relu(a)
        begins.append(graph.version)
        tf.concat([tf.matmul(b, w2), a[:, :4], mask], 1)
        units = [Unit(f"u{i}", (), begin) for i, begin in enumerate(begins)]
        free = {op.name for op in graph.get_operations()[: begins[0]] if op.type != "Placeholder"}
        costs = count_costs(graph, units, free)
    assert costs.work[0] == 2 * 8 * 16 + PER_ELEMENT * 16
    assert costs.work[1] == PER_ELEMENT * 16
    assert costs.work[2] > 2 * 16 * 4
    # `a` goes on to the last unit beside `b`; the mask follows from the data.
    assert costs.crossing == (0.0, 16.0, 32.0)
