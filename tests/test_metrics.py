"""Metrics by hand, from PAPER's definitions."""

from __future__ import annotations

import warnings
from math import exp, inf, isnan, log

import numpy as np
import pytest

from quarkrl.metrics import (
    average_maximum,
    distinct,
    distinct_shares,
    last_seen,
    maxima,
    perplexities,
    perplexity,
    probability,
    reached,
    share,
    shares,
)

NAN = float("nan")
NOTHING = [np.empty((0, 25)), np.full((2, 3), NAN)]


@pytest.fixture(autouse=True)
def no_warnings():
    """A NaN is an answer; NumPy's warnings on the way to it are noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_average_maximum_is_the_mean_of_the_maxima():
    assert average_maximum(np.array([[0.1, 0.9], [0.3, 0.2]])) == pytest.approx((0.9 + 0.3) / 2)


def test_average_maximum_leaves_out_what_has_no_score():
    scores = np.array([[0.1, NAN, 0.7], [NAN, NAN, NAN], [0.2, 0.1, NAN]])
    assert average_maximum(scores) == pytest.approx((0.7 + 0.2) / 2)


def test_probability_is_the_share_of_prompts_with_a_score_at_the_threshold_or_above():
    scores = np.array([[0.1, 0.5], [0.4999, 0.1], [0.9, 0.9], [0.0, 0.0]])
    assert probability(scores) == 2 / 4  # 0.5 counts, 0.4999 does not, and a prompt counts once
    assert probability(scores, threshold=0.9) == 1 / 4
    assert probability(scores, threshold=0.0) == 1


def test_probability_leaves_out_what_has_no_score():
    assert probability(np.array([[NAN, 0.6], [NAN, NAN], [0.1, NAN]])) == 1 / 2


def test_share_is_of_completions_and_its_mean_over_prompts():
    """% positive: the second prompt weighs as much as the first, though only one of its completions is scored."""
    scores = np.array([[0.5, 0.4999, 0.9, 0.1], [0.7, NAN, NAN, NAN], [NAN, NAN, NAN, NAN]])
    assert shares(scores)[:2].tolist() == [2 / 4, 1] and isnan(shares(scores)[2])
    assert share(scores) == (2 / 4 + 1) / 2
    assert share(scores, threshold=0.8) == (1 / 4 + 0) / 2


@pytest.mark.parametrize("scores", NOTHING, ids=["no prompts", "no scores"])
def test_without_scores_there_is_no_number(scores):
    assert isnan(average_maximum(scores)) and isnan(probability(scores)) and isnan(share(scores))


def test_by_prompt_what_has_no_score_stays_without():
    scores = np.array([[0.1, NAN, -0.7], [NAN, NAN, NAN]])
    assert maxima(scores)[0] == 0.1 and isnan(maxima(scores)[1])
    assert reached(np.array([0.5, 0.2]), 0.5).tolist() == [1, 0] and isnan(reached(np.array([NAN]), 0.5)[0])


@pytest.mark.parametrize(
    ("completions", "n", "expected"),
    [
        ([["a b a"]], 1, 2 / 3),
        ([["a b a b"]], 2, 2 / 4),  # ab, ba over words, not over bigrams
        ([["a b c"]], 3, 1 / 3),
        ([["a b", "a b"]], 2, 1 / 4),  # over all completions of a prompt
        ([["a b", "b a"]], 2, 2 / 4),  # no bigram reaches from one completion into the next
        ([["a"], ["a a"]], 1, (1 + 1 / 2) / 2),  # mean over prompts
        ([["a"]], 2, 0),  # a word and no bigram
        ([["a\n\tb  a "]], 1, 2 / 3),  # any white space
        ([["", "a b"], ["", " "]], 1, 1),  # empty completions hold no words; prompts without words are left out
    ],
)
def test_distinct_by_hand(completions, n, expected):
    assert distinct(completions, n) == pytest.approx(expected)


def test_distinct_by_prompt_leaves_out_the_one_without_words():
    found = distinct_shares([["a b a"], [""], ["a b"]], 1)
    assert found[0] == pytest.approx(2 / 3) and isnan(found[1]) and found[2] == 1


@pytest.mark.parametrize("completions", [[], [[]], [["", " "]]], ids=str)
def test_distinct_of_no_words_is_no_number(completions):
    assert isnan(distinct(completions, 1))


def test_perplexity_is_the_mean_of_the_completions_perplexities():
    # exp(log 16 / 2) = 4 and exp(log 8 / 3) = 2: their mean, not the perplexity of all five tokens.
    value, left_out = perplexity([log(16), log(8)], [2, 3])
    assert value == pytest.approx(3)
    assert left_out == {"empty": 0, "dropped": 0}


def test_perplexity_skips_completions_without_tokens_and_counts_them():
    value, left_out = perplexity([0.0, log(4), 0.0], [0, 1, 0])
    assert value == pytest.approx(4) and left_out == {"empty": 2, "dropped": 0}


def test_perplexities_of_ten_thousand_and_more_are_dropped_and_counted():
    value, left_out = perplexity([log(9_999), log(10_001), 2 * log(1e5), log(5)], [1, 1, 2, 1])
    assert value == pytest.approx((9_999 + 5) / 2) and left_out == {"empty": 0, "dropped": 2}
    just = np.nextafter(log(1e4), 10)
    assert exp(just) >= 1e4 and perplexity([just], [1])[1] == {"empty": 0, "dropped": 1}


def test_an_impossible_completion_is_dropped():
    value, left_out = perplexity([1e6, float("inf"), log(2)], [1, 1, 1])
    assert value == pytest.approx(2) and left_out == {"empty": 0, "dropped": 2}


@pytest.mark.parametrize(
    ("sums", "counts", "left_out"),
    [
        ([], [], {"empty": 0, "dropped": 0}),
        ([0.0], [0], {"empty": 1, "dropped": 0}),
        ([20.0], [1], {"empty": 0, "dropped": 1}),
    ],
)
def test_perplexity_of_nothing_is_no_number(sums, counts, left_out):
    value, found = perplexity(sums, counts)
    assert isnan(value) and found == left_out


def test_perplexities_keep_their_places():
    values, left_out = perplexities([log(16), 0.0, 20.0], [2, 0, 1])
    assert values[0] == pytest.approx(4) and isnan(values[1]) and isnan(values[2])
    assert left_out == {"empty": 1, "dropped": 1}


def test_how_far_back_a_prediction_was_last_seen():
    # Text 5 7 5 9 7; predicted for its second to last place, each from what stands before.
    assert last_seen([5, 7, 5, 9, 7], [5, 5, 7, 8]).tolist() == [
        1,  # 5, just before
        2,  # 5, at place 0; that place 2 will be 5 too is not known yet
        2,  # 7, at place 1
        inf,  # 8, nowhere
    ]
    assert last_seen([5, 5, 5], [5, 5]).tolist() == [1, 1]  # the last of several
    assert last_seen([5, 7], [7]).tolist() == [inf]  # the token to predict is not yet there
    assert last_seen([5], []).tolist() == []
