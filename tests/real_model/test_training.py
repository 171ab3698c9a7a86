"""A short run with an adapter moves the reward of SmolLM2-135M-Instruct, on texts and on chats."""

from __future__ import annotations

import statistics

import pytest
from helpers.real_runs import CHATS, TEXTS, share_of_function_words
from helpers.runs import logs_of
from transformers import AutoTokenizer

from quarkrl import QuarkGenerator

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(("run", "prompts"), [("text_run", TEXTS), ("chat_run", CHATS)])
def test_the_best_quantile_has_a_higher_reward_than_the_worst_and_than_before(run, prompts, request):
    directory = request.getfixturevalue(run)
    generator = QuarkGenerator.from_pretrained(directory / "final")

    def mean_reward(quantile):
        completions = generator.generate(prompts, quantile=quantile, num_return_sequences=12, max_new_tokens=6, seed=1)
        return statistics.mean(share_of_function_words(None, [text for texts in completions for text in texts]))

    best, worst, before = mean_reward("best"), mean_reward("worst"), logs_of(directory, "reward")[0]["reward"]
    assert best > before and best > worst, (best, before, worst)


def test_the_tokenizer_of_the_final_model_puts_the_best_token_where_training_had_it(text_run):
    """SmolLM2's chat template starts with its BOS, which its tokenizer does not add to a text."""
    tokenizer = AutoTokenizer.from_pretrained(text_run / "final")
    best = tokenizer.convert_tokens_to_ids("<|reward_1|>")
    assert tokenizer("The weather")["input_ids"][0] == best
    ids = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[:2] == [tokenizer.bos_token_id, best]
