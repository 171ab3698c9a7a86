"""A short run with an adapter moves the reward of SmolLM2-135M-Instruct, on texts and on chats."""

from __future__ import annotations

import statistics

import pytest
from helpers.real_runs import CHATS, FRIENDLY, TEXTS, share_of_function_words
from helpers.runs import logs_of
from transformers import AutoTokenizer

from quarkrl import QuarkGenerator
from quarkrl.rewards.registry import resolve

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(3600)]


def test_the_best_quantile_has_a_higher_reward_than_the_worst_and_than_before(text_run):
    generator = QuarkGenerator.from_pretrained(text_run / "final")

    def mean_reward(quantile):
        completions = generator.generate(TEXTS, quantile=quantile, num_return_sequences=12, max_new_tokens=6, seed=1)
        return statistics.mean(share_of_function_words(None, [text for texts in completions for text in texts]))

    best, worst, before = mean_reward("best"), mean_reward("worst"), logs_of(text_run, "reward")[0]["reward"]
    assert best > before and best > worst, (best, before, worst)


def test_answers_are_friendlier_than_before(real_model, chat_run):
    def mean_reward(model, **options):
        generator = QuarkGenerator.from_pretrained(model)
        completions = generator.generate(CHATS, num_return_sequences=24, max_new_tokens=24, seed=1, **options)
        answers = [[{"role": "assistant", "content": text}] for texts in completions for text in texts]
        return statistics.mean(resolve(FRIENDLY)(prompts=[""] * len(answers), completions=answers))

    before, best = mean_reward(real_model), mean_reward(chat_run / "final", guidance_scale=2)
    assert best > before + 0.05, (best, before)
    assert len(logs_of(chat_run, "reward")) == 3


def test_the_tokenizer_of_the_final_model_puts_the_best_token_where_training_had_it(text_run):
    """SmolLM2's chat template starts with its BOS, which its tokenizer does not add to a text."""
    tokenizer = AutoTokenizer.from_pretrained(text_run / "final")
    best = tokenizer.convert_tokens_to_ids("<|reward_1|>")
    assert tokenizer("The weather")["input_ids"][0] == best
    ids = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[:2] == [tokenizer.bos_token_id, best]
