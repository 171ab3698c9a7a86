"""What is trained is what is served: the saved tokenizer gives the ids of training, or the run is refused."""

from __future__ import annotations

import os

import pytest
from helpers.random_tokenizers import random_tokenizer
from helpers.reward_token_models import add_reward_tokens
from transformers import AutoTokenizer

from quarkrl.data.encoding import RefusedText, try_encode_prompts
from quarkrl.data.prompts import load_prompts
from quarkrl.errors import UserError
from quarkrl.models.special_tokens import surrounding_ids
from quarkrl.training.served import check_served_ids

SEED = os.environ.get("QUARKRL_TOKENIZER_SEED", "0")


def difference(seed: str, directory) -> str | None:
    """Steer a random tokenizer, save it and load it; describe the first text whose ids are not those of training."""
    tokenizer, texts = random_tokenizer(seed)
    used_ids = 1 + max(tokenizer.get_vocab().values())
    rows = used_ids if int(seed.split("-")[1]) % 3 else used_ids + 7
    conditioning, extended, model = add_reward_tokens(tokenizer, rows=rows)
    steered = conditioning.steer_tokenizer(extended)
    before, _ = surrounding_ids(tokenizer)
    ids = try_encode_prompts(tokenizer, texts, empty_ids=before)
    try:
        prompts = load_prompts(texts, skip_bad=True).encode(tokenizer, max_length=200, skip_bad=True)
        check_served_ids(tokenizer, steered, conditioning, model.config, prompts)
    except UserError as error:
        return f"refused: {error}"
    model.config.save_pretrained(directory)
    steered.save_pretrained(directory)
    served = AutoTokenizer.from_pretrained(directory)
    for text, plain_ids in zip(texts, ids, strict=True):
        if isinstance(plain_ids, RefusedText):  # A tokenizer without UNK.
            continue
        trained = conditioning.prefix(plain_ids, conditioning.best)
        if (found := served(text)["input_ids"]) != trained:
            return f"{text!r}: trained {trained}, served {found}"
    return None


def check_random_tokenizers(count: int, directory) -> None:
    problems = {f"{SEED}-{i}": difference(f"{SEED}-{i}", directory / str(i)) for i in range(count)}
    problems = {seed: problem for seed, problem in problems.items() if problem}
    refused = {seed: problem for seed, problem in problems.items() if problem.startswith("refused")}
    assert problems == refused
    assert all("\n" not in problem for problem in refused.values())
    assert len(refused) <= count * 0.02, refused


def test_random_tokenizers_give_the_same_ids_when_saved_and_loaded(tmp_path):
    check_random_tokenizers(60, tmp_path)


@pytest.mark.slow
def test_a_thousand_random_tokenizers_give_the_same_ids_when_saved_and_loaded(tmp_path):
    check_random_tokenizers(1000, tmp_path)
