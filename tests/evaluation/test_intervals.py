"""Confidence intervals: few prompts by enumeration of all resamples, many prompts by theory."""

from __future__ import annotations

import itertools
from math import isnan, nan

import numpy as np
import pytest

from quarkrl.evaluation.intervals import Ratio, intervals


def test_a_ratio_weights_prompts_equally_or_completions_equally():
    values = np.array([[1.0, 2.0, nan], [6.0, nan, nan], [nan, nan, nan]])
    assert Ratio.of(values).value == pytest.approx((1 + 2 + 6) / 3)
    assert Ratio.of(np.array([1.5, 6.0, nan])).value == pytest.approx((1.5 + 6) / 2)
    assert isnan(Ratio.of(np.array([nan, nan])).value)


def test_the_interval_of_two_prompts_ends_at_their_values():
    """A quarter of the resamples draws one prompt twice, so both 2.5 % ends are values of a single prompt."""
    assert intervals({"x": Ratio.of(np.array([2.0, 5.0]))}) == {"x": (2.0, 5.0)}


def test_the_interval_has_the_percentiles_of_all_resamples():
    values = np.array([[0.0, 1.0], [2.0, nan], [4.0, 7.0], [1.0, 1.0]])
    means = []
    for draw in itertools.product(range(4), repeat=4):  # All 256 are equally likely.
        means.append(np.nanmean(values[list(draw)]))  # A mean over completions: a ratio, not a mean of means.
    expected = np.quantile(means, (0.025, 0.975))
    assert intervals({"x": Ratio.of(values)}, resamples=20_000)["x"] == pytest.approx(expected, abs=0.1)


def test_the_interval_of_a_mean_has_the_theoretical_width():
    values = np.random.default_rng(3).normal(size=2_000)
    low, high = intervals({"x": Ratio.of(values)}, resamples=2_000)["x"]
    half = 1.96 * values.std() / np.sqrt(2_000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=half / 10)


def test_an_interval_depends_on_the_seed_and_not_on_other_figures():
    one, other = (Ratio.of(np.random.default_rng(k).random(30)) for k in (1, 2))
    alone = intervals({"x": one}, resamples=500)["x"]
    assert intervals({"y": other, "x": one}, resamples=500)["x"] == pytest.approx(alone)
    assert intervals({"x": one}, resamples=500, seed=1)["x"] != pytest.approx(alone)


def test_chunks_of_resamples_do_not_change_the_interval(monkeypatch):
    ratios = {"x": Ratio.of(np.random.default_rng(1).random(30))}
    whole = intervals(ratios, resamples=500)
    monkeypatch.setattr("quarkrl.evaluation.intervals._DRAWS_AT_A_TIME", 31 * 30)
    assert intervals(ratios, resamples=500)["x"] == pytest.approx(whole["x"])


@pytest.mark.parametrize("values", [[], [1.0], [nan, nan, nan]], ids=str)
def test_fewer_than_two_prompts_or_no_value_have_no_interval(values):
    low, high = intervals({"x": Ratio.of(np.array(values))})["x"]
    assert isnan(low) and isnan(high)


def test_a_resample_that_misses_all_prompts_that_count_is_ignored():
    assert intervals({"x": Ratio.of(np.array([3.0, nan, nan]))}) == {"x": (3.0, 3.0)}
    assert intervals({}) == {}
