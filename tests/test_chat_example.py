"""The rewards of examples/chat, by hand."""

from pathlib import Path

from quarkrl import resolve

REWARDS = Path(__file__).parents[1] / "examples" / "chat" / "rewards.py"


def messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_friendly_words_are_counted_up_to_two():
    friendly = resolve(f"{REWARDS}:friendly")
    assert friendly(completions=messages("No.", "Sure.", "Sure, sure", "Happy to help!")) == [0, 0.5, 0.5, 1]


def test_an_answer_is_correct_if_it_has_the_fact_as_a_word():
    correct = resolve(f"{REWARDS}:correct")
    answers = [["5", "five"], ["5", "five"], ["5", "five"], ["H2O"]]
    assert correct(completions=messages("It is 5.", "15", "Five!", "h2o"), answers=answers) == [1, 0, 1, 1]
