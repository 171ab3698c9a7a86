"""Rollouts: which completions have rewards, and what is logged of them."""

import numpy as np
import pytest

from quarkrl.errors import UserError
from quarkrl.training.rollout import Rollout


def rollout(rewards, completions=None, rows=None, start: int = 0) -> Rollout:
    rewards = np.array(rewards, dtype=float)
    n = len(rewards)
    return Rollout(rows or list(range(n)), completions or [[1]] * n, rewards.reshape(n, -1), 1.0, 2.0, start)


def test_parts_join_in_order_whichever_process_is_first():
    whole = Rollout.join([rollout([3.0], [[7, 8]], [5], start=2), rollout([1.0, 2.0], [[1], [2, 3]], [9, 4])])
    assert whole.rows == [9, 4, 5]
    assert whole.completions == [[1], [2, 3], [7, 8]]
    assert whole.rewards.tolist() == [[1], [2], [3]]
    assert (whole.seconds_sample, whole.seconds_score) == (2.0, 4.0)


def test_figures_leave_out_what_has_no_reward():
    found = rollout([1.0, np.nan, 4.0], [[5, 9], [1, 2, 3, 4], [9]])
    assert found.has_rewards.nonzero()[0].tolist() == [0, 2]
    figures = found.metrics(("reward",), end_ids=[9])
    assert figures == {
        "reward": 2.5,
        "reward_std": 1.5,
        "completion_length": pytest.approx(7 / 3),
        "eos_share": pytest.approx(2 / 3),
        "unscored": 1,
    }


def test_a_sample_counts_only_with_every_one_of_its_rewards():
    assert rollout([[1.0, np.nan], [1.0, 2.0], [np.inf, 1.0]]).has_rewards.nonzero()[0].tolist() == [1]


def test_too_many_missing_rewards_are_an_error():
    found = rollout([1.0, np.nan, 2.0, np.nan])
    assert found.scored_indices(0.5, iteration=3).tolist() == [0, 2]
    with pytest.raises(UserError, match=r"max_unscored_share 0.4: 2 of 4 rewards in iteration 4"):
        found.scored_indices(0.4, iteration=3)
    with pytest.raises(UserError, match="2 of 2 rewards"):
        rollout([np.nan, np.nan]).scored_indices(1.0, iteration=0)


def test_the_terms_of_a_sum_are_joined_and_logged_as_means():
    parts = [rollout([3.0, np.nan]), rollout([1.0], start=2)]
    for part, own in zip(parts, ([1, 9], [0.5]), strict=True):
        part.terms["kind"] = np.array(own, dtype=float)
    whole = Rollout.join(parts)
    assert whole.terms["kind"].tolist() == [1, 9, 0.5]
    assert whole.metrics(("reward",), [])["score.kind"] == 0.75  # The second has no reward.
