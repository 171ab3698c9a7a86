"""Pairs of completions of a prompt, DPO's loss, and the log-likelihoods that it is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quarkrl.algorithm import sliced_loss
from quarkrl.algorithm.pairs import dpo_loss, find_pairs
from quarkrl.algorithm.pool import DataPool
from quarkrl.algorithm.sliced_loss import log_likelihoods
from quarkrl.models.completion_logits import Projection


def add(pool: DataPool, prompts: list[int], rewards: list[float], iteration: int) -> None:
    pool.add([[prompt] for prompt in prompts], [[9]] * len(prompts), rewards, iteration=iteration)
    pool.quantize()


def test_a_sample_is_paired_with_the_one_of_its_prompt_and_iteration_that_differs_most():
    pool = DataPool(2)
    add(pool, [1, 2, 1, 1, 2], [0.1, 0.5, 0.9, 0.4, 0.7], iteration=0)
    better, worse = find_pairs(pool, np.arange(5))
    assert better.tolist() == [2, 4, 2, 2, 4] and worse.tolist() == [0, 1, 0, 3, 1]
    add(pool, [1, 1], [0.2, 0.3], iteration=1)  # The same prompt again.
    better, worse = find_pairs(pool, np.array([5, 6, 0]))
    assert better.tolist() == [6, 6, 2] and worse.tolist() == [5, 5, 0]


def test_equal_rewards_make_a_pair_of_one_sample_which_teaches_nothing():
    pool = DataPool(2)
    add(pool, [1, 1, 2], [0.5, 0.5, 0.9], iteration=0)
    better, worse = find_pairs(pool, np.arange(3))
    assert better.tolist() == worse.tolist()
    gain = torch.zeros(1, requires_grad=True)
    dpo_loss(gain, gain, beta=0.1).sum().backward()
    assert gain.grad.item() == 0


def test_dpo_loss_by_hand():
    better, worse = torch.tensor([3.0, -1.0]), torch.tensor([-7.0, 4.0])
    expected = [-np.log(1 / (1 + np.exp(-1.0))), -np.log(1 / (1 + np.exp(0.5)))]
    torch.testing.assert_close(dpo_loss(better, worse, beta=0.1), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("slice_length", [1, 4, 100])
def test_log_likelihoods_are_those_of_whole_logits_with_the_same_gradients(monkeypatch, slice_length):
    monkeypatch.setattr(sliced_loss, "default_slice_length", lambda vocab: slice_length)
    labels = torch.tensor([[-100, 3, 5, -100], [-100, -100, 2, 6], [-100, 1, 1, 0]])
    hidden, weight, rows = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 5), (8, 5), (2, 5)))
    results = []
    for whole in (True, False):
        tensors = [tensor.clone().requires_grad_() for tensor in (hidden, weight, rows)]
        projection = Projection(tensors[0], tensors[1], row_ids=torch.tensor([6, 7]), row_values=tensors[2])
        projection = projection.suppress_early_eos(labels, 1, [0])
        if whole:
            log_p = projection.logits().log_softmax(-1).gather(1, labels[labels != -100][:, None])[:, 0]
            totals = torch.stack([part.sum() for part in log_p.split([2, 2, 3])])
        else:
            totals = log_likelihoods(projection, labels)
        (totals * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
        results.append((totals.detach(), *(tensor.grad for tensor in tensors)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
