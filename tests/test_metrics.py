"""Each metric by hand, from the definitions in PAPER.md."""

from __future__ import annotations

import warnings
from math import exp, inf, isnan, log

import numpy as np
import pytest

from quarkrl.evaluation.intervals import Ratio
from quarkrl.metrics import (
    distinct_shares,
    diversity,
    last_seen,
    maxima,
    perplexities,
    reached,
    rep_n,
    shares,
)

NAN = float("nan")
WITHOUT_SCORES = [np.empty((0, 25)), np.full((2, 3), NAN)]


@pytest.fixture(autouse=True)
def no_warnings():
    """NaN is a valid result; NumPy must not warn about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def mean(values) -> float:
    """The mean over prompts or completions, as in the tables of an evaluation."""
    return Ratio.of(np.asarray(values)).value


# Scores


def test_average_maximum_is_the_mean_over_prompts_of_the_maxima():
    assert mean(maxima(np.array([[0.1, 0.9], [0.3, 0.2]]))) == pytest.approx((0.9 + 0.3) / 2)


def test_average_maximum_excludes_missing_scores():
    scores = np.array([[0.1, NAN, 0.7], [NAN, NAN, NAN], [0.2, 0.1, NAN]])
    assert mean(maxima(scores)) == pytest.approx((0.7 + 0.2) / 2)


def test_probability_is_the_share_of_prompts_with_a_score_of_at_least_the_threshold():
    scores = np.array([[0.1, 0.5], [0.4999, 0.1], [0.9, 0.9], [0.0, 0.0]])
    assert mean(reached(maxima(scores))) == 2 / 4  # 0.5 counts, 0.4999 does not, and a prompt counts once.
    assert mean(reached(maxima(scores), threshold=0.9)) == 1 / 4
    assert mean(reached(maxima(scores), threshold=0.0)) == 1


def test_probability_excludes_missing_scores():
    assert mean(reached(maxima(np.array([[NAN, 0.6], [NAN, NAN], [0.1, NAN]])))) == 1 / 2


def test_share_is_a_mean_over_prompts_of_shares_of_completions():
    """Prompts have equal weight: the second prompt has one score, the first has four."""
    scores = np.array([[0.5, 0.4999, 0.9, 0.1], [0.7, NAN, NAN, NAN], [NAN, NAN, NAN, NAN]])
    assert shares(scores)[:2].tolist() == [2 / 4, 1] and isnan(shares(scores)[2])
    assert mean(shares(scores)) == (2 / 4 + 1) / 2
    assert mean(shares(scores, threshold=0.8)) == (1 / 4 + 0) / 2


@pytest.mark.parametrize("scores", WITHOUT_SCORES, ids=["no prompts", "no scores"])
def test_metrics_without_scores_are_nan(scores):
    assert isnan(mean(maxima(scores))) and isnan(mean(reached(maxima(scores)))) and isnan(mean(shares(scores)))


def test_values_by_prompt_are_nan_where_scores_are_missing():
    scores = np.array([[0.1, NAN, -0.7], [NAN, NAN, NAN]])
    assert maxima(scores)[0] == 0.1 and isnan(maxima(scores)[1])
    assert reached(np.array([0.5, 0.2]), 0.5).tolist() == [1, 0] and isnan(reached(np.array([NAN]), 0.5)[0])


# dist-n


@pytest.mark.parametrize(
    ("completions", "n", "expected"),
    [
        ([["a b a"]], 1, 2 / 3),
        ([["a b a b"]], 2, 2 / 4),  # "a b", "b a"; divided by words, not by bigrams
        ([["a b c"]], 3, 1 / 3),
        ([["a b", "a b"]], 2, 1 / 4),  # over all completions of a prompt
        ([["a b", "b a"]], 2, 2 / 4),  # no bigram spans two completions
        ([["a"], ["a a"]], 1, (1 + 1 / 2) / 2),  # a mean over prompts
        ([["a"]], 2, 0),  # one word, no bigram
        ([["a\n\tb  a "]], 1, 2 / 3),  # any white space separates words
        ([["", "a b"], ["", " "]], 1, 1),  # a completion without words adds nothing; such a prompt does not count
    ],
)
def test_distinct_by_hand(completions, n, expected):
    assert mean(distinct_shares(completions, n)) == pytest.approx(expected)


def test_distinct_by_prompt_is_nan_for_a_prompt_without_words():
    values = distinct_shares([["a b a"], [""], ["a b"]], 1)
    assert values[0] == pytest.approx(2 / 3) and isnan(values[1]) and values[2] == 1


@pytest.mark.parametrize("completions", [[], [[]], [["", " "]]], ids=str)
def test_distinct_without_words_is_nan(completions):
    assert isnan(mean(distinct_shares(completions, 1)))


# Perplexity


def test_perplexity_is_the_mean_of_the_perplexities_of_completions():
    # exp(log 16 / 2) = 4 and exp(log 8 / 3) = 2: their mean, not the perplexity of all five tokens.
    values, left_out = perplexities([log(16), log(8)], [2, 3])
    assert mean(values) == pytest.approx(3)
    assert left_out == {"empty": 0, "dropped": 0}


def test_perplexity_skips_and_counts_completions_without_tokens():
    values, left_out = perplexities([0.0, log(4), 0.0], [0, 1, 0])
    assert mean(values) == pytest.approx(4) and left_out == {"empty": 2, "dropped": 0}


def test_perplexities_of_at_least_10000_are_dropped_and_counted():
    values, left_out = perplexities([log(9_999), log(10_001), 2 * log(1e5), log(5)], [1, 1, 2, 1])
    assert mean(values) == pytest.approx((9_999 + 5) / 2) and left_out == {"empty": 0, "dropped": 2}
    limit = np.nextafter(log(1e4), 10)
    assert exp(limit) >= 1e4 and perplexities([limit], [1])[1] == {"empty": 0, "dropped": 1}


def test_an_infinite_perplexity_is_dropped():
    values, left_out = perplexities([1e6, float("inf"), log(2)], [1, 1, 1])
    assert mean(values) == pytest.approx(2) and left_out == {"empty": 0, "dropped": 2}


@pytest.mark.parametrize(
    ("sums", "counts", "expected"),
    [
        ([], [], {"empty": 0, "dropped": 0}),
        ([0.0], [0], {"empty": 1, "dropped": 0}),
        ([20.0], [1], {"empty": 0, "dropped": 1}),
    ],
)
def test_perplexity_without_a_completion_that_counts_is_nan(sums, counts, expected):
    values, left_out = perplexities(sums, counts)
    assert isnan(mean(values)) and left_out == expected


def test_perplexities_keep_the_order_of_completions():
    values, left_out = perplexities([log(16), 0.0, 20.0], [2, 0, 1])
    assert values[0] == pytest.approx(4) and isnan(values[1]) and isnan(values[2])
    assert left_out == {"empty": 1, "dropped": 1}


# Repetition


@pytest.mark.parametrize(
    ("units", "n", "expected"),
    [
        ("abab", 2, 100 * (1 - 2 / 3)),  # ab, ba, ab: the last n-gram counts
        ("abcab", 2, 100 * (1 - 3 / 4)),  # ab, bc, ca, ab: only the last one repeats
        ("aaaa", 3, 100 * (1 - 1 / 2)),
        ("abcd", 4, 0),  # one 4-gram
        ("aabb", 1, 100 * (1 - 2 / 4)),
        ((7, 8, 7, 8, 7), 3, 100 * (1 - 2 / 3)),  # token ids
    ],
)
def test_rep_n_by_hand(units, n, expected):
    assert rep_n(units, n) == pytest.approx(expected)


@pytest.mark.parametrize(("units", "n"), [("", 1), ("a", 2), ("abc", 4)])
def test_rep_n_of_a_text_shorter_than_n_is_nan(units, n):
    assert isnan(rep_n(units, n))


def test_diversity_is_the_product_of_the_shares_of_distinct_n_grams():
    # ababab: 2 of 5 bigrams, 2 of 4 trigrams and 2 of 3 4-grams are distinct.
    assert diversity("ababab") == pytest.approx(2 / 5 * 2 / 4 * 2 / 3)
    assert diversity("abcd") == 1
    assert isnan(diversity("abc"))


def test_last_seen_is_the_distance_to_the_last_occurrence_of_a_prediction():
    # Text 5 7 5 9 7; the predictions are for its second to last position, each from the tokens before it.
    assert last_seen([5, 7, 5, 9, 7], [5, 5, 7, 8]).tolist() == [
        1,  # 5, the preceding token
        2,  # 5, at position 0; position 2, which is also 5, is not known yet
        2,  # 7, at position 1
        inf,  # 8, nowhere
    ]
    assert last_seen([5, 5, 5], [5, 5]).tolist() == [1, 1]  # the last of several
    assert last_seen([5, 7], [7]).tolist() == [inf]  # the token to predict does not count
    assert last_seen([5], []).tolist() == []
