"""`Scorer`: the arithmetic of one or several rewards, to the digit, and its options."""

import functools
import math

import numpy as np
import pytest
from helpers.errors import error_message
from helpers.reward_helpers import IDS, PROMPTS, TEXTS, length, score

from quarkrl.rewards import Scorer


def test_one_reward_gives_one_column_of_numbers():
    scores = score(length)
    assert scores.rewards.tolist() == [[1.0], [2.0], [0.0], [4.0]]
    assert scores.components.tolist() == scores.rewards.tolist()
    assert scores.rewards.dtype == np.float64


def test_a_single_callable_need_not_be_in_a_list():
    assert Scorer(length)(PROMPTS, TEXTS, IDS).rewards[:, 0].tolist() == [1, 2, 0, 4]


def test_no_completions_give_empty_arrays_and_call_nothing():
    def never(completions):
        raise AssertionError

    scores = Scorer([never, never], condition_on="each")([], [], [], {})
    assert scores.rewards.shape == scores.components.shape == (0, 2)


def test_a_sum_is_weighted_and_components_are_not():
    def ones(completions):
        return [1.0] * len(completions)

    scores = score(length, ones, weights=[0.5, -2])
    assert scores.components.tolist() == [[1, 1], [2, 1], [0, 1], [4, 1]]
    assert scores.rewards.tolist() == [[-1.5], [-1.0], [-2.0], [0.0]]  # 0.5 · length - 2
    assert score(length, weights=[3]).rewards[:, 0].tolist() == [3, 6, 0, 12]


def test_the_terms_of_a_sum_have_the_rewards_names_and_a_single_reward_has_no_terms():
    scores = score(length, length, weights=[1, 3])
    assert {name: values.tolist() for name, values in scores.terms.items()} == {
        "length": [1, 2, 0, 4],
        "length-2": [1, 2, 0, 4],
    }
    assert score(length).terms == score(length, length, condition_on="each").terms == {}


def test_each_keeps_every_reward_as_an_attribute_of_its_own():
    scorer = Scorer([length, lambda completions: [7] * len(completions)], condition_on="each")
    assert scorer.attributes == scorer.names == ("length", "lambda")
    assert scorer(PROMPTS, TEXTS, IDS, {}).rewards.tolist() == [[1, 7], [2, 7], [0, 7], [4, 7]]
    assert Scorer([length, length]).attributes == ("reward",)


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, np.float32("nan"), 10**400])
def test_a_missing_score_is_nan_and_so_is_its_sum_even_with_weight_zero(missing):
    scores = score(length, lambda completions: [5, missing, 6, 7], weights=[1, 0])
    assert np.isnan(scores.components).tolist() == [
        [False, False],
        [False, True],
        [False, False],
        [False, False],
    ]
    assert np.isnan(scores.rewards[:, 0]).tolist() == [False, True, False, False]
    assert scores.rewards[[0, 2, 3], 0].tolist() == [1, 0, 4]


def test_names_are_unique_and_fit_into_a_token():
    class Named:
        name = "Être <kind>|really"

        def __call__(self, completions):
            return length(completions)

    assert Scorer([length, length, Named(), functools.partial(length)]).names == (
        "length",
        "length-2",
        "tre-kind-really",
        "length-3",
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weights": [1.0]}, "reward_weights [1.0]: must be one number per reward, 2 in all"),
        ({"weights": [1.0, math.nan]}, "reward_weights nan: must be a finite number"),
        ({"weights": [1.0, "2"]}, "reward_weights '2': must be a finite number"),
        ({"weights": [1, 1], "condition_on": "each"}, "reward_weights [1, 1]: must be unset with condition_on 'each'"),
        ({"condition_on": "all"}, "condition_on 'all': must be 'sum' or 'each'"),
        ({"timeout": 0}, "reward_timeout 0: must be above 0"),
        ({"timeout": -1}, "reward_timeout -1: must be above 0"),
        ({"timeout": math.nan}, "reward_timeout nan: must be above 0"),
    ],
)
def test_invalid_options_are_refused(options, expected):
    assert expected in error_message(lambda: Scorer([length, length], **options))


def test_at_least_one_reward_is_required():
    assert "at least one reward" in error_message(lambda: Scorer([]))


def test_the_class_of_a_reward_is_known_for_a_single_unweighted_reward():
    class Kind:
        unwanted = None
        wanted, wanted_from = "kind", 0.5

        def __call__(self, completions):
            return length(completions)

    class Tame(Kind):
        unwanted = "toxicity"

    def classes(*arguments, **options):
        scorer = Scorer(*arguments, **options)
        return scorer.unwanted, scorer.wanted, scorer.wanted_from

    assert classes(Tame()) == ("toxicity", None, None)
    assert classes(Kind()) == classes(Kind(), weights=[1]) == (None, "kind", 0.5)
    assert classes(Tame(), weights=[2]) == classes([Kind(), length]) == classes(length) == (None, None, None)
