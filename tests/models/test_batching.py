"""What a batch is made of: little padding on prompts as long as real ones are."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny import SHARED, needs_shared

from quarkrl.data.prompts import load_prompts
from quarkrl.models.batching import bucketed, padded
from quarkrl.models.loading import load_tokenizer
from quarkrl.training.exploration import prompt_schedule

COMPLETION = 20  # tokens


@pytest.fixture(scope="module")
def prompt_ids():
    """RealToxicityPrompts' prompts, as a byte-level BPE of English reads them."""
    tokenizer = load_tokenizer(str(SHARED / "models" / "webmix-gpt2"))
    return load_prompts(str(SHARED / "data" / "realtoxicityprompts.train.jsonl")).encode(tokenizer, max_length=100).ids


def batches(lengths, size: int) -> list[np.ndarray]:
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


@needs_shared
@pytest.mark.parametrize("size", [32, 128])
def test_exploring_pads_at_most_a_twentieth(prompt_ids, size):
    rows = prompt_schedule(prompt_ids, 1, 3000, 1, seed=0)
    lengths = np.array([len(prompt_ids[row]) for row in rows])
    read = sum(len(batch) * (batch.max() + COMPLETION) for batch in batches(lengths, size))
    assert 1 - (lengths.sum() + COMPLETION * len(lengths)) / read <= 0.05


@needs_shared
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("steps", [35, 500])
def test_learning_pads_at_most_a_twentieth(prompt_ids, size, steps):
    rng = np.random.default_rng(0)
    pool = np.array([len(ids) for ids in prompt_ids]) + rng.integers(3, COMPLETION + 1, len(prompt_ids))
    drawn = rng.integers(len(pool), size=size * steps)
    order = bucketed(drawn, pool[drawn], size, rng)
    assert sorted(order) == sorted(drawn)
    read = sum(len(batch) * batch.max() for batch in batches(pool[order], size))
    assert 1 - pool[order].sum() / read <= 0.05


def test_a_batch_by_hand():
    batch = padded([[1, 2], [3]], [[4], [5, 6, 7]])
    assert batch["input_ids"].tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 4, -100], [-100, 5, 6, 7]]
