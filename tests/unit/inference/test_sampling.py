"""Draws: which tokens they may be, how often each comes, and what they depend on."""

import math

import numpy as np
import pytest
import tensorflow as tf

from llmos_tf.inference import SamplingConfig, sample
from llmos_tf.inference.sampling import SamplingValues

pytestmark = pytest.mark.fast

ROWS = 20_000
DTYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)
PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.2, 0.25])


def draws(logits, rows=ROWS, step=0, dtype=tf.float32, **options):
    """One draw for each of many equal rows, int32 `[rows]`."""
    logits_BV = tf.tile(tf.constant(logits, dtype)[tf.newaxis], [rows, 1])
    return sample(logits_BV, SamplingConfig(**options), step).numpy()


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def kept_by_hugging_face(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities after the logits processors of `transformers`, in their order."""
    scores = np.asarray(logits, np.float64) / temperature
    if top_k is not None:
        scores = np.where(scores < np.sort(scores)[-min(top_k, len(scores))], -np.inf, scores)
    if top_p is not None and top_p < 1:
        order = np.argsort(scores)
        removed = np.cumsum(softmax(scores)[order]) <= 1 - top_p
        removed[-1] = False
        scores[order[removed]] = -np.inf
    return softmax(scores)


OPTIONS = {
    "all": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_k above the vocabulary": {"top_k": 99},
    "top_p": {"top_p": 0.7},
    "top_p of one token": {"top_p": 0.01},
    "top_p of all": {"top_p": 1.0},
    # 0.4 of 0.4 + 0.25 is 0.62: with top_k first one token is left, with top_p first two are.
    "top_k before top_p": {"top_k": 2, "top_p": 0.6},
    # 0.4 is above 0.35, and 0.27 of the flattened distribution is below it.
    "temperature before top_p": {"temperature": 3.0, "top_p": 0.35},
    "everything": {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
}


def test_tokens_come_as_often_as_they_should():
    """Fails for a draw outside the set, a set of another size, steps in another order than those of
    Hugging Face, or frequencies that are not the softmax of what is kept."""
    logits = np.log(PROBABILITIES)
    for case, options in OPTIONS.items():
        expected = kept_by_hugging_face(logits, **options)
        counts = np.bincount(draws(logits, seed=7, **options), minlength=len(logits))
        np.testing.assert_array_equal(counts > 0, expected > 0, case)
        # A count is binomial: 4.5 standard deviations are left behind once in 150,000 draws of it.
        deviation = np.sqrt(ROWS * expected * (1 - expected))
        assert np.all(np.abs(counts - ROWS * expected) <= 4.5 * deviation), case


def test_steps_and_seeds_draw_as_rows_do():
    """Fails if draws of one row repeat over steps or seeds, or two of these are tied together."""
    logits_BV = tf.constant(np.log(PROBABILITIES)[np.newaxis], tf.float32)
    values = SamplingValues.of(SamplingConfig())

    @tf.function
    def many(seeds, steps):
        def one(pair):
            return sample(logits_BV, values._replace(seed=pair[0]), pair[1])[0]

        return tf.map_fn(one, (seeds, steps), fn_output_signature=tf.int32)

    size = 2_000
    series, zeros = tf.range(size), tf.zeros(size, tf.int32)
    for tokens in (many(zeros, series), many(series, zeros), many(series, series)):
        counts = np.bincount(tokens, minlength=5)
        deviation = np.sqrt(size * PROBABILITIES * (1 - PROBABILITIES))
        assert np.all(np.abs(counts - size * PROBABILITIES) <= 4.5 * deviation)


def test_a_draw_is_a_function_of_seed_step_row_and_token():
    """Fails if a draw depends on what was drawn before, or rows, steps or seeds share theirs."""
    logits = np.zeros(1000)
    first = draws(logits, rows=50, seed=1)
    draws(logits, rows=3, seed=2)
    np.testing.assert_array_equal(draws(logits, rows=50, seed=1), first)
    assert len(set(first)) > 40
    assert np.mean(first == draws(logits, rows=50, seed=2)) < 0.1
    assert np.mean(first == draws(logits, rows=50, seed=1, step=1)) < 0.1
    # A row draws what it would draw without those below it.
    np.testing.assert_array_equal(draws(logits, rows=5, seed=1), first[:5])


def test_rounding_does_not_change_the_draw():
    """Fails if noise belongs to a rank of the order: on another mesh, where logits are rounded in
    another way, tokens of like logits would change places and with them their noise."""
    rng = np.random.default_rng(0)
    logits = np.linspace(0, 1e-6, 1000)
    # What is cut is far from what is not.
    logits[:10] -= 30
    rounded = logits + rng.uniform(-1e-8, 1e-8, logits.shape)
    assert np.any(np.argsort(logits) != np.argsort(rounded))
    for cut in ({}, {"top_k": 990}, {"top_p": 1 - 1e-9}):
        one = draws(logits, rows=500, dtype=tf.float64, **cut)
        other = draws(rounded, rows=500, dtype=tf.float64, **cut)
        np.testing.assert_array_equal(one, other)


def test_the_sorted_way_draws_what_the_unsorted_one_does():
    """Fails if the short way for uncut vocabularies and the long one are different samplers."""
    logits = np.random.default_rng(0).normal(size=50)
    # The least likely token is left out, and it is not drawn in this many rows.
    np.testing.assert_array_equal(
        draws(logits, rows=200, temperature=0.3), draws(logits, rows=200, temperature=0.3, top_k=49)
    )


def test_temperature_zero_takes_the_likeliest():
    """Fails if seed, step, or the other options move a greedy choice, or a tie goes to the
    larger token."""
    numbers = np.random.default_rng(0).normal(size=[20, 40])
    for dtype in DTYPES:
        logits_BV = tf.constant(numbers, dtype)
        expected = np.argmax(tf.cast(logits_BV, tf.float64).numpy(), axis=1)
        for options in ({}, {"seed": 5}, {"top_k": 3}, {"top_p": 0.9}):
            config = SamplingConfig(temperature=0, **options)
            np.testing.assert_array_equal(sample(logits_BV, config, step=3), expected)
        assert set(draws([1.0, 7.0, 7.0, 2.0], rows=9, dtype=dtype, temperature=0)) == {1}


def test_temperatures_at_the_ends():
    """Fails if a tiny temperature overflows to NaN, or a huge one is not uniform."""
    logits = [1.0, 3.0, 2.0]
    assert set(draws(logits, rows=100, temperature=1e-300)) == {1}
    assert set(draws([1e30, 3e30, -2e30], rows=100, temperature=1e-20)) == {1}
    counts = np.bincount(draws(logits, temperature=1e300))
    assert np.all(np.abs(counts / ROWS - 1 / 3) < 4.5 * math.sqrt(2 / 9 / ROWS))


def test_padding_is_never_drawn():
    """Fails if a high temperature brings back tokens that only fill up a vocabulary, whose logit is
    the least number, or tokens without a logit."""
    for dtype in DTYPES:
        logits = [0.5, float(dtype.min), 1.0, -math.inf, math.nan, 0.0]
        for options in ({}, {"top_k": 5}, {"top_p": 0.99}):
            tokens = draws(logits, rows=2000, dtype=dtype, temperature=1e300, **options)
            assert set(tokens) == {0, 2, 5}


def test_tokens_beyond_the_tokenizer_are_never_drawn():
    """Fails if a model's spare tokens are drawn, however likely they are, or take from top_k."""
    logits = [0.0, 1.0, 2.0, 9.0, 9.0]
    assert set(draws(logits, vocab_size=3)) == {0, 1, 2}
    assert set(draws(logits, vocab_size=3, top_k=2)) == {1, 2}
    assert set(draws(logits, vocab_size=3, top_p=0.5)) == {2}
    assert set(draws(logits, vocab_size=3, temperature=0)) == {2}
    assert set(draws(logits, vocab_size=99, temperature=0)) == {3}


def test_ties_do_not_make_the_set_larger():
    """Fails if tokens as likely as the last that is kept are kept too."""
    assert set(draws(np.zeros(8), top_k=3)) == {0, 1, 2}
    # Powers of two: the sum of four is 0.5 exactly, and reaches it.
    assert set(draws(np.zeros(8), top_p=0.5)) == {0, 1, 2, 3}
    assert set(draws(np.zeros(8), top_p=0.51)) == {0, 1, 2, 3, 4}


def test_a_top_p_of_one_cuts_nothing():
    """Fails if unlikely tokens are lost where the likely ones sum to 1 by rounding."""
    assert SamplingValues.of(SamplingConfig(top_p=1.0)) == SamplingValues.of(SamplingConfig())
