"""`unique_names`: no name occurs twice, whatever the names are."""

from __future__ import annotations

from quarkrl.names import unique_names


def test_a_repeated_name_gets_the_first_number_that_is_free():
    assert unique_names(["a", "a-3", "a", "a", "b"]) == ["a", "a-3", "a-2", "a-4", "b"]


def test_a_taken_name_gets_a_number():
    assert unique_names(["reward", "x"], taken={"reward"}) == ["reward-2", "x"]
