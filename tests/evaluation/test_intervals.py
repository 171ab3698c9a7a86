"""Intervals by hand where prompts are few enough to write all resamples down, and against theory where they are not."""

from __future__ import annotations

import itertools
from math import isnan, nan

import numpy as np
import pytest

from quarkrl.evaluation.intervals import Ratio, intervals


def test_a_ratio_over_prompts_weighs_prompts_alike_and_one_over_completions_completions():
    values = np.array([[1.0, 2.0, nan], [6.0, nan, nan], [nan, nan, nan]])
    assert Ratio.of(values).value == pytest.approx((1 + 2 + 6) / 3)
    assert Ratio.of(np.array([1.5, 6.0, nan])).value == pytest.approx((1.5 + 6) / 2)
    assert isnan(Ratio.of(np.array([nan, nan])).value)


def test_the_interval_of_two_prompts_is_between_their_values():
    """Each is drawn twice in a quarter of the resamples, so the ends at 2.5 % are the values themselves."""
    assert intervals({"x": Ratio.of(np.array([2.0, 5.0]))}) == {"x": (2.0, 5.0)}


def test_the_interval_is_the_percentile_one_of_all_resamples():
    values = np.array([[0.0, 1.0], [2.0, nan], [4.0, 7.0], [1.0, 1.0]])
    everything = []
    for drawn in itertools.product(range(4), repeat=4):  # All 256, each equally likely.
        everything.append(np.nanmean(values[list(drawn)]))  # A mean over completions: a ratio, not a mean of means.
    expected = np.quantile(everything, (0.025, 0.975))
    assert intervals({"x": Ratio.of(values)}, resamples=20_000)["x"] == pytest.approx(expected, abs=0.1)


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(3).normal(size=2_000)
    low, high = intervals({"x": Ratio.of(values)}, resamples=2_000)["x"]
    half = 1.96 * values.std() / np.sqrt(2_000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=half / 10)


def test_the_same_seed_gives_the_same_interval_in_any_company_and_another_seed_another():
    one, other = (Ratio.of(np.random.default_rng(k).random(30)) for k in (1, 2))
    alone = intervals({"x": one}, resamples=500)["x"]
    assert intervals({"y": other, "x": one}, resamples=500)["x"] == pytest.approx(alone)
    assert intervals({"x": one}, resamples=500, seed=1)["x"] != pytest.approx(alone)


def test_drawing_in_chunks_changes_nothing(monkeypatch):
    ratios = {"x": Ratio.of(np.random.default_rng(1).random(30))}
    whole = intervals(ratios, resamples=500)
    monkeypatch.setattr("quarkrl.evaluation.intervals._DRAWS_AT_A_TIME", 31 * 30)
    assert intervals(ratios, resamples=500)["x"] == pytest.approx(whole["x"])


@pytest.mark.parametrize("values", [[], [1.0], [nan, nan, nan]], ids=str)
def test_without_two_prompts_or_any_value_there_is_no_interval(values):
    low, high = intervals({"x": Ratio.of(np.array(values))})["x"]
    assert isnan(low) and isnan(high)


def test_a_resample_that_misses_the_few_prompts_that_count_is_passed_over():
    assert intervals({"x": Ratio.of(np.array([3.0, nan, nan]))}) == {"x": (3.0, 3.0)}
    assert intervals({}) == {}
