"""Prompts that are set aside before training."""

from __future__ import annotations

from quarkrl.data.hold_out import choose_prompts, hold_out
from quarkrl.data.prompts import load_prompts


def prompts_of(*texts: str):
    return load_prompts([{"prompt": text, "topic": text[-1]} for text in texts])


def test_a_prompt_is_on_one_side_and_brings_its_columns():
    texts = [f"prompt {i}" for i in range(100)]
    kept, held_out = hold_out(prompts_of(*texts), 10)
    assert len(held_out) == 10 and sorted(kept.prompts + held_out.prompts) == sorted(texts)
    assert held_out.columns["topic"] == [text[-1] for text in held_out.prompts]


def test_the_choice_does_not_depend_on_the_order_or_on_copies():
    texts = [f"prompt {i}" for i in range(50)]
    held_out = hold_out(prompts_of(*texts), 5)[1]
    kept, again = hold_out(prompts_of(*reversed(texts), *texts, *texts), 5)
    assert sorted(again.prompts) == sorted(held_out.prompts)
    assert len(kept) == 3 * 45 and not {*kept.prompts} & {*again.prompts}


def test_few_prompts_are_all_trained_on():
    assert [len(part) for part in hold_out(prompts_of(*"abcdefghijklmnopqrs"), 64)] == [19, 0]
    assert [len(part) for part in hold_out(prompts_of(*"abcdefghijklmnopqrst"), 64)] == [16, 4]  # One in five.


def test_some_of_many_prompts_are_chosen_in_their_order():
    texts = [f"prompt {i}" for i in range(30)]
    chosen = choose_prompts(prompts_of(*texts), 7).prompts
    assert len(chosen) == 7 and chosen == [text for text in texts if text in chosen] != texts[:7]
    assert choose_prompts(prompts_of(*texts), 30).prompts == texts
