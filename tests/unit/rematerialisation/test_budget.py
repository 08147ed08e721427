"""What is chosen within a budget is the cheapest that fits."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_tf.rematerialisation import budget
from llmos_tf.rematerialisation.budget import Way, cheapest_within, least_bytes

pytestmark = pytest.mark.fast

_ways = st.lists(st.builds(Way, st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3)
_blocks = st.lists(_ways, max_size=5)


def of_choice(blocks, chosen):
    ways = [block[i] for block, i in zip(blocks, chosen, strict=True)]
    return sum(way.bytes for way in ways), sum(way.cost for way in ways)


@given(blocks=_blocks, spare=st.integers(0, 30))
def test_it_costs_what_the_cheapest_of_all_costs(blocks, spare):
    """Fails if a choice is dropped that would have been cheapest, or one is taken that does not
    fit."""
    limit = least_bytes(blocks) + spare
    every = itertools.product(*(range(len(ways)) for ways in blocks))
    fitting = [
        cost for size, cost in (of_choice(blocks, chosen) for chosen in every) if size <= limit
    ]
    size, cost = of_choice(blocks, cheapest_within(blocks, limit))
    assert size <= limit
    assert cost == min(fitting)


def test_of_equal_blocks_the_first_are_computed_again():
    """Fails if the last are: what they compute again would come on top of what the first keep."""
    assert cheapest_within([[Way(100, 0.0), Way(10, 5.0)]] * 4, 220) == (1, 1, 0, 0)


@given(blocks=st.lists(_ways, min_size=2, max_size=8), spare=st.integers(0, 30))
def test_many_blocks_that_differ_still_fit(blocks, spare):
    """Fails if, where not all choices are compared, what fits is lost."""
    limit = least_bytes(blocks) + spare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "MAX_FRONT", 2)
        size, _ = of_choice(blocks, cheapest_within(blocks, limit))
    assert size <= limit


def test_a_budget_that_nothing_fits_says_what_would():
    """Fails if too small a budget is taken, or the user is not told what would do."""
    with pytest.raises(ValueError, match=r"keep 30 bytes at least.*budget of 29 bytes"):
        cheapest_within([[Way(100, 0.0), Way(10, 5.0)]] * 3, 29)
