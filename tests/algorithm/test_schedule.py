"""The order of the data: which prompts an iteration explores, and which draws share a batch."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.tiny_models import SHARED, needs_shared

from quarkrl.algorithm.schedule import bucket_by_length, schedule_prompts
from quarkrl.data.prompts import load_prompts
from quarkrl.models.loading import load_tokenizer

PROMPTS = [[0] * length for length in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)]  # Ten prompts of these lengths.
COMPLETION_LENGTH = 20


# Prompts


@pytest.mark.parametrize("count", [1, 3, 4, 7, 10])
def test_each_pass_contains_every_prompt_once(count):
    """Iterations take their prompts from one sequence of passes, ten prompts long each."""
    iterations = [schedule_prompts(PROMPTS, i, count, 1, seed=5) for i in range(10)]
    rows = [row for iteration in iterations for row in iteration]
    assert sorted(rows) == sorted(list(range(10)) * count)
    if count in (1, 10):  # No iteration spans two passes.
        assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in range(0, len(rows), 10))


@pytest.mark.parametrize("count", [None, 10, 99])
def test_without_a_count_or_with_a_larger_one_all_prompts_are_scheduled(count):
    assert sorted(schedule_prompts(PROMPTS, 3, count, 1, seed=0)) == list(range(10))


def test_the_schedule_depends_on_its_arguments_alone():
    first = schedule_prompts(PROMPTS, 2, 4, 2, seed=1)
    np.random.default_rng().random(3)
    np.random.seed(99)
    assert schedule_prompts(PROMPTS, 2, 4, 2, seed=1) == first
    assert schedule_prompts(PROMPTS, 0, 4, 2, seed=1) != first != schedule_prompts(PROMPTS, 2, 4, 2, seed=2)


def test_an_iteration_continues_where_the_one_before_ended():
    # Ten prompts, four per iteration: iteration 2 takes the last two of pass 0 and the first two of pass 1.
    passes = [np.random.default_rng((7, number)).permutation(10).tolist() for number in range(2)]
    expected = [passes[0][0:4], passes[0][4:8], passes[0][8:] + passes[1][:2], passes[1][2:6]]
    for iteration, rows in enumerate(expected):
        assert sorted(schedule_prompts(PROMPTS, iteration, 4, 1, seed=7)) == sorted(rows)


def test_an_iteration_is_sorted_by_length_and_the_repetitions_of_a_prompt_are_adjacent():
    rows = schedule_prompts(PROMPTS, 0, None, 3, seed=0)
    lengths = [len(PROMPTS[row]) for row in rows]
    assert lengths == sorted(lengths)
    assert all(len(set(rows[i : i + 3])) == 1 for i in range(0, 30, 3))


# Batches


@pytest.mark.parametrize(("count", "size"), [(8, 8), (24, 4), (400, 4), (1000, 8)])
def test_bucketing_permutes_the_draws_and_gives_a_batch_similar_lengths(count, size):
    rng = np.random.default_rng(0)
    draws = rng.integers(100, size=count)
    lengths = rng.integers(1, 50, size=count)
    order = bucket_by_length(np.arange(count), lengths, size, np.random.default_rng(1))
    assert sorted(order) == list(range(count))
    repeated = bucket_by_length(draws, lengths, size, np.random.default_rng(1))
    assert repeated.tolist() == draws[order].tolist()
    if count > size:
        spread = np.ptp(lengths[order].reshape(-1, size), axis=1).mean()
        assert spread < np.ptp(lengths.reshape(-1, size), axis=1).mean() / 2


def test_bucketing_shuffles_batches_and_stays_within_windows_of_fifty():
    # Batches of one draw: 50 draws per window, 120 draws. The lengths grow, so sorting alone would change nothing.
    order = bucket_by_length(np.arange(120), np.arange(120), 1, np.random.default_rng(0)).tolist()
    for window in (slice(0, 50), slice(50, 100), slice(100, 120)):
        assert order[window] != list(range(120))[window] == sorted(order[window])


# Padding, for prompts of real lengths


@pytest.fixture(scope="module")
def prompt_ids():
    """The prompts of RealToxicityPrompts as token ids of a byte-level BPE for English."""
    tokenizer = load_tokenizer(str(SHARED / "models" / "webmix-gpt2"))
    return load_prompts(str(SHARED / "data" / "realtoxicityprompts.train.jsonl")).encode(tokenizer, max_length=100).ids


def padded_length(lengths: np.ndarray, size: int) -> int:
    """Positions of all batches of `size` rows, each padded to its longest row."""
    batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return sum(len(batch) * batch.max() for batch in batches)


@needs_shared
@pytest.mark.parametrize("size", [32, 128])
def test_at_most_a_twentieth_of_explored_positions_is_padding(prompt_ids, size):
    rows = schedule_prompts(prompt_ids, 1, 3000, 1, seed=0)
    lengths = np.array([len(prompt_ids[row]) for row in rows]) + COMPLETION_LENGTH
    assert 1 - lengths.sum() / padded_length(lengths, size) <= 0.05


@needs_shared
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("steps", [35, 500])
def test_at_most_a_twentieth_of_learned_positions_is_padding(prompt_ids, size, steps):
    rng = np.random.default_rng(0)
    pool = np.array([len(ids) for ids in prompt_ids]) + rng.integers(3, COMPLETION_LENGTH + 1, len(prompt_ids))
    draws = rng.integers(len(pool), size=size * steps)
    order = bucket_by_length(draws, pool[draws], size, rng)
    assert sorted(order) == sorted(draws)
    assert 1 - pool[order].sum() / padded_length(pool[order], size) <= 0.05
