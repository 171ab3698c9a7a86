"""Which prompts an iteration explores, what came of it, and how drawn samples become batches."""

from __future__ import annotations

import numpy as np
import pytest

from quarkrl.batches import bucketed, padded
from quarkrl.errors import UserError
from quarkrl.rollout import Rollout, prompt_schedule

IDS = [[0] * length for length in (3, 1, 4, 1, 5, 9, 2, 6, 5, 3)]  # Ten prompts, of these lengths.


def rollout(rewards, completions=None, rows=None, start: int = 0) -> Rollout:
    rewards = np.array(rewards, dtype=float)
    n = len(rewards)
    return Rollout(rows or list(range(n)), completions or [[1]] * n, rewards.reshape(n, -1), 1.0, 2.0, start)


# The schedule


@pytest.mark.parametrize("count", [1, 3, 4, 7, 10])
def test_every_prompt_comes_once_in_each_pass(count):
    """Iterations take their prompts from one long row of passes; each ten of it are all ten prompts."""
    long_row: list[list[int]] = [sorted(prompt_schedule(IDS, i, count, 1, seed=5)) for i in range(10)]
    taken = [row for rows in long_row for row in rows]
    assert len(taken) == 10 * count
    assert sorted(taken) == sorted(list(range(10)) * count)
    if count in (1, 10):  # No iteration straddles two passes.
        assert all(sorted(taken[i : i + 10]) == list(range(10)) for i in range(0, len(taken), 10))


def test_without_a_count_or_with_too_large_a_one_all_prompts_are_taken():
    for count in (None, 10, 99):
        assert sorted(prompt_schedule(IDS, 3, count, 1, seed=0)) == list(range(10))


def test_the_schedule_is_a_pure_function_of_its_arguments():
    first = prompt_schedule(IDS, 2, 4, 2, seed=1)
    np.random.default_rng().random(3)
    np.random.seed(99)
    assert prompt_schedule(IDS, 2, 4, 2, seed=1) == first
    assert prompt_schedule(IDS, 0, 4, 2, seed=1) != first != prompt_schedule(IDS, 2, 4, 2, seed=2)


def test_within_an_iteration_prompts_go_by_length_and_repeats_stand_together():
    rows = prompt_schedule(IDS, 0, None, 3, seed=0)
    lengths = [len(IDS[row]) for row in rows]
    assert lengths == sorted(lengths)
    assert all(len(set(rows[i : i + 3])) == 1 for i in range(0, 30, 3))


# What was sampled


def test_parts_join_in_order_whichever_process_is_first():
    whole = Rollout.join([rollout([3.0], [[7, 8]], [5], start=2), rollout([1.0, 2.0], [[1], [2, 3]], [9, 4])])
    assert whole.rows == [9, 4, 5]
    assert whole.completions == [[1], [2, 3], [7, 8]]
    assert whole.rewards.tolist() == [[1], [2], [3]]
    assert (whole.seconds_sample, whole.seconds_score) == (2.0, 4.0)


def test_figures_leave_out_what_has_no_reward():
    found = rollout([1.0, np.nan, 4.0], [[5, 9], [1, 2, 3, 4], [9]])
    assert found.scored.tolist() == [0, 2]
    figures = found.figures(("reward",), end_ids=[9])
    assert figures == {
        "reward": 2.5,
        "reward_std": 1.5,
        "completion_length": pytest.approx(7 / 3),
        "eos_share": pytest.approx(2 / 3),
        "unscored": 1,
    }


def test_a_sample_counts_only_with_every_one_of_its_rewards():
    assert rollout([[1.0, np.nan], [1.0, 2.0], [np.inf, 1.0]]).scored.tolist() == [1]


def test_too_many_missing_rewards_are_an_error():
    found = rollout([1.0, np.nan, 2.0, np.nan])
    assert found.scored_enough(0.5, iteration=3).tolist() == [0, 2]
    with pytest.raises(UserError, match=r"2 of 4 rewards of iteration 3 .*max_unscored_share"):
        found.scored_enough(0.4, iteration=3)
    with pytest.raises(UserError, match="2 of 2 rewards"):
        rollout([np.nan, np.nan]).scored_enough(1.0, iteration=0)


# Batches


@pytest.mark.parametrize(("count", "size"), [(8, 8), (24, 4), (400, 4), (1000, 8)])
def test_bucketing_is_a_permutation_with_like_lengths_in_a_batch(count, size):
    rng = np.random.default_rng(0)
    drawn = rng.integers(100, size=count)
    lengths = rng.integers(1, 50, size=count)
    order = bucketed(np.arange(count), lengths, size, np.random.default_rng(1))
    assert sorted(order) == list(range(count))
    again = bucketed(drawn, lengths, size, np.random.default_rng(1))
    assert again.tolist() == drawn[order].tolist()
    if count > size:
        spread = np.ptp(lengths[order].reshape(-1, size), axis=1).mean()
        assert spread < np.ptp(lengths.reshape(-1, size), axis=1).mean() / 2


def test_batches_are_padded_on_the_right_and_labelled_at_completions_only():
    batch = padded([[7], [8, 9, 7]], [[5, 0, 6], [4]])
    assert batch["input_ids"].tolist() == [[7, 5, 0, 6], [8, 9, 7, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 0, 6], [-100, -100, -100, 4]]
    batch = padded([[7], [8, 9, 7]], [[5], [4, 3]])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, -100, -100, -100], [-100, -100, -100, 4, 3]]
