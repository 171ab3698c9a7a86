"""`Repetition`: its formula by hand, and that a policy cannot raise it by writing little."""

from __future__ import annotations

import math

import pytest

from quarkrl.errors import UserError
from quarkrl.metrics import diversity, rep_n
from quarkrl.rewards import Repetition, Scorer

A, B, C, EOS = 7, 8, 9, 0


@pytest.mark.parametrize(
    ("units", "n", "expected"),
    [
        ([A, B, C, A], 1, 25.0),  # A comes twice: 3 of 4 are distinct
        ([A, B, C, A], 2, 0.0),
        ([A, B, A, B, A], 2, 50.0),  # AB BA AB BA
        ([A, B, A, B, A], 3, 100 / 3),  # ABA BAB ABA: SimCTG, which leaves the last one out, finds 0
        ([A] * 6, 2, 80.0),  # five times AA
        (["x", "y", "x", "y"], 2, 100 / 3),
        ([A, B], 2, 0.0),
    ],
)
def test_rep_n_by_hand(units, n, expected):
    assert rep_n(units, n) == pytest.approx(expected)


def test_a_text_without_an_n_gram_has_no_rep_n():
    assert math.isnan(rep_n([A], 2)) and math.isnan(rep_n([], 1))
    assert math.isnan(diversity([A, B, C]))


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ([A, B, C, EOS], 1.0),
        ([A, B, A, B, A], (2 / 4) * (2 / 3) * (2 / 2)),
        ([A] * 6, (1 / 5) * (1 / 4) * (1 / 3)),
    ],
)
def test_diversity_by_hand(units, expected):
    assert diversity(units) == pytest.approx(expected)


def test_the_reward_is_the_diversity_of_token_ids_without_eos():
    ids = [[A, B, A, B, A, EOS], [A, B, A, B, A], [A, B, C, A, C]]
    texts = ["", "one text", "the same words the same words"]  # Not read.
    scorer = Scorer("repetition")
    assert scorer(texts, texts, ids, end_ids=[EOS]).rewards[:, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1.0])
    counted = scorer(texts, texts, ids).rewards[0, 0]  # Nobody says that 0 is EOS.
    assert counted == pytest.approx((3 / 5) * (3 / 4) * (3 / 3))


def test_words_are_counted_where_white_space_separates_them():
    texts = ["a b a b a", "a  b\nc d", "a-b a-b"]
    scores = Scorer("repetition?unit=words")(texts, texts, [[], [], []])
    assert scores.rewards[:, 0].tolist() == pytest.approx([1 / 3, 1.0, 0.0])


@pytest.mark.parametrize("ids", [[], [EOS], [A, EOS], [A, B, C], [A, B, C, EOS]])
def test_a_short_completion_has_the_lowest_reward(ids):
    (little, repeating, good) = Repetition()(["x"] * 3 if ids else [""] * 3, [ids, [A] * 50, [A, B, C, A, C]], [EOS])
    assert little == 0.0 < repeating < good == 1.0


def test_the_length_of_a_short_completion_is_an_option():
    reward = Scorer("repetition?min_units=6")
    assert reward(["p"] * 2, ["x"] * 2, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]).rewards[:, 0].tolist() == [0.0, 1.0]
    assert Scorer("repetition").identity[0]["min_units"] == 4 != reward.identity[0]["min_units"]


def test_an_invalid_option_is_refused():
    for make, expected in {
        lambda: Repetition(unit="letters"): "unit 'letters': must be 'tokens' or 'words'",
        lambda: Repetition(min_units=3): "min_units 3: must be at least 4",
        lambda: Scorer("repetition")(["p"], ["some words"], [[]]): "Use repetition?unit=words",
    }.items():
        with pytest.raises(UserError) as caught:
            make()
        assert expected in str(caught.value) and "\n" not in str(caught.value)
