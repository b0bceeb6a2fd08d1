"""Estimates and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelocal.evaluate.statistics import RESAMPLES, SEED, Bootstrap, Estimate


def drawn(values: list[np.ndarray]) -> list[np.ndarray]:
    """Every draw as it is defined: whole sequences, chosen again with replacement, laid end to end."""
    random = np.random.default_rng(SEED)
    choices = random.integers(0, len(values), (RESAMPLES, len(values)))
    return [np.concatenate([values[i] for i in row]) for row in choices]


def interval(estimates: list[float]) -> tuple[float, float]:
    low, high = np.quantile(estimates, [0.025, 0.975])
    return float(low), float(high)


lengths = st.lists(st.integers(1, 9), min_size=2, max_size=7)


@settings(max_examples=15)
@given(lengths, st.integers(0, 99))
def test_means_equal_those_of_the_draws_laid_end_to_end(sizes, seed):
    random = np.random.default_rng(seed)
    values = [random.exponential(size=size) for size in sizes]
    found = Bootstrap(len(values)).mean(values)
    assert found.value == pytest.approx(np.concatenate(values).mean())
    assert (found.low, found.high) == pytest.approx(interval([draw.mean() for draw in drawn(values)]))


@settings(max_examples=15)
@given(lengths, st.integers(0, 99))
def test_a_function_of_the_mean_is_taken_of_each_draw(sizes, seed):
    random = np.random.default_rng(seed)
    values = [random.exponential(size=size) for size in sizes]
    found = Bootstrap(len(values)).mean(values, np.exp)
    assert found.value == pytest.approx(np.exp(np.concatenate(values).mean()))
    assert (found.low, found.high) == pytest.approx(interval([np.exp(d.mean()) for d in drawn(values)]))


@settings(max_examples=6)  # each lays a thousand draws end to end
@given(lengths, st.integers(0, 99), st.booleans())
def test_quantiles_are_the_least_values_that_a_share_does_not_exceed(sizes, seed, ties):
    random = np.random.default_rng(seed)
    values = [random.exponential(size=size) for size in sizes]
    values = [np.round(v, 1) for v in values] if ties else values
    shares = (0.5, 0.95, 0.999)
    draws = drawn(values)
    for share, found in zip(shares, Bootstrap(len(values)).quantiles(values, shares), strict=True):
        whole = np.concatenate(values)
        assert found.value == np.quantile(whole, share, method="inverted_cdf")
        expected = interval([np.quantile(draw, share, method="inverted_cdf") for draw in draws])
        assert (found.low, found.high) == pytest.approx(expected)


def test_one_sequence_has_no_interval():
    values = [np.arange(10.0)]
    draws = Bootstrap(1)
    assert draws.mean(values) == Estimate(4.5, None, None)
    assert draws.quantiles(values, [0.5]) == [Estimate(4.0, None, None)]


def test_intervals_are_the_same_every_time():
    values = [np.arange(5.0), np.arange(3.0), np.arange(9.0)]
    assert Bootstrap(3).mean(values) == Bootstrap(3).mean(values)


def test_intervals_hold_what_they_promise():
    # 100 corpora of 40 sequences with a true mean of 1: about 95 % of the intervals must hold it. The percentile
    # bootstrap covers a little less in small samples; 0.86 is 4.1 standard errors below 0.95
    random = np.random.default_rng(11)
    inside = 0
    for _ in range(100):
        levels = random.normal(1.0, 0.5, 40)
        values = [level + random.normal(0, 0.3, 8) for level in levels]
        found = Bootstrap(40).mean(values)
        inside += found.low <= 1.0 <= found.high
    assert 0.86 < inside / 100 < 1
