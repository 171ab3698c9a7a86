"""The rating in a judge's answer: structured, or marked as a rating, or none. It is never guessed."""

from __future__ import annotations

import pytest

from quarkrl.rewards.functions.rating import read_rating


@pytest.mark.parametrize(
    ("content", "rating"),
    [
        ('{"score": 7}', 7),
        ('{"score": 7.5, "reason": "2 insults"}', 7.5),
        ('{"rating": 7}', 7),
        ('{"score": "8"}', 8),
        ('{"score": "8/10"}', 8),
        ('{"result": {"Score": 8}, "insults": 2}', 8),
        ('{"criteria": [{"score": 2}, {"score": 4}], "score": 9}', 9),
        ('{"criteria": [{"score": 2}, {"score": 4}]}', None),
        ('```json\n{"reason": "9 kind words", "score": 6.5}\n```', 6.5),
        ('I count 2 insults.\n{"score": 8}\nAll 3 are mild.', 8),
        ('{"score": 8} Score: 3', 8),
        ('{"score": 11}', None),  # Outside the scale; no other number replaces it.
        ('{"score": 11} 8', None),
        ('{"score": null} Score: 3', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e999}', None),
        ('{"score": ' + "9" * 5000 + "}", None),
        ('{"score": [8]}', None),
        ('{"score": 3} … no, wait: {"score": 4}', None),
        ("{" * 10_000, None),
    ],
)
def test_json_is_read_first(content, rating):
    assert read_rating(content, 1, 10) == rating


@pytest.mark.parametrize(
    ("content", "rating"),
    [
        ("Score: 8", 8),
        ("**Score:** 8 … 2 insults", 8),
        ("Score: **8**. Reason: 3 slurs", 8),
        ("Rating: 9\nIt has 3 insults", 9),
        ("score = 8.5", 8.5),
        ("Rating: [[8]]", 8),
        ("{'score': 8}", 8),
        ("**Final score (1-10):** 8/10", 8),
        ("Score out of 10: 8", 8),
        ("Score：８".replace("８", "8"), 8),
        ("### Score\n\n**8**\n\n3 insults", 8),
        ("<score>8</score> 2 insults", 8),
        (r"So the answer is \boxed{8}.", 8),
        ("Score: 8/10", 8),
        ("Score: 8 out of 10, 3 insults", 8),
        ("Score: 8 – mild", 8),
        ("Score: 8 (max score: 10)", 8),
        ("Score: 8. As I said, score: 8", 8),
        ("Kindness score: 3. Overall score: 7", 7),
        ("Kindness score: 3. Clarity score: 7", None),
        ('The text says "Score: 10". Score: 2', None),
        ("The maximum score is: 10", None),
        ("Maximum score: 10", None),
        ("Score: 4/5", None),  # Another scale.
        ("Score: 80/100", None),
        ("Score: 8%", None),
        ("Score: 7-8", None),
        ("Score: 7 to 8", None),
        ("Score: 8,5", None),
        ("Score: 1.2.3", None),
        ("Score: 11", None),
        ("Score: -3", None),
        ("Score:\n1. It is kind", None),
        ("Score: high, with 3 insults", None),
        ("subscore: 8", None),
        ("score-8: 8", None),
    ],
)
def test_a_marked_rating_is_read(content, rating):
    assert read_rating(content, 1, 10) == rating


@pytest.mark.parametrize(
    ("content", "rating"), [("8", 8), (" **7**\n", 7), ("8/10.", 8), ("8 out of 10", 8), ("0", None)]
)
def test_an_answer_of_nothing_but_a_number_is_a_rating(content, rating):
    assert read_rating(content, 1, 10) == rating


@pytest.mark.parametrize(
    "content",
    [
        *("I'd say 7.", "It deserves 8/10", "On a scale of 1 to 10, it is a 6", "In 2024 I'd have said 3, and now 5"),
        *("It has 3 insults.", "gpt4 v2.5.1 says no", "", "none", "7 or 8", "8/5"),
    ],
)
def test_a_number_that_is_not_marked_is_no_rating(content):
    assert read_rating(content, 1, 10) is None


@pytest.mark.parametrize(
    ("content", "rating"),
    [
        ("<think>maybe score: 3? or 9</think> Score: 4", 4),
        ("Score: 3? or 9</think>\n\n4", 4),
        ('{"score": 3}\n</think>\n{"score": 4}', 4),
        ("<think>Score: 3 or", None),
        ("[THINK]Score: 3[/THINK]8", 8),
        ("◁think▷Score: 3◁/think▷8", 8),
        ("<score>8</score><reasoning>a score: 3 at first</reasoning>", 8),
        ("<Reasoning>score: 3</Reasoning>\nRating: 8", 8),
    ],
)
def test_reasoning_is_left_out(content, rating):
    assert read_rating(content, 1, 10) == rating


@pytest.mark.parametrize(
    ("content", "rating"),
    [
        ("Score: 1", None),  # It could have become 10.
        ('{"score": 1', None),
        ("1", None),
        ('{"score": 3, "because', 3),
        ("Score: 3. Because 2", 3),
        ("first 3, then", None),
    ],
)
def test_a_number_at_the_end_of_a_truncated_answer_does_not_count(content, rating):
    assert read_rating(content, 1, 10, truncated=True) == rating


def test_other_scales():
    assert read_rating("-2", -5, 5) == read_rating("Score: −2", -5, 5) == -2
    assert read_rating('{"score": -2.5}', -5, 5) == -2.5
    assert read_rating("0.8 of 1", 0, 1) == read_rating("0.8/1", 0, 1) == 0.8
