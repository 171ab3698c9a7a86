"""Exploration in a run: what is sampled, scored and logged."""

from __future__ import annotations

import time

import pytest
import torch
from helpers.eight_letters import TOKENIZER
from helpers.runs import logs_of, small_trainer
from helpers.tiny_models import tiny_model

from quarkrl import QuarkTrainer
from quarkrl.algorithm.pool import DataPool
from quarkrl.models.batching import build_batch
from quarkrl.sampling.sampler import sample
from quarkrl.sampling.strategy import Sampling

MODEL = tiny_model("gpt2", TOKENIZER)


def trainer_of(directory, rewards, **options) -> QuarkTrainer:
    """A trainer of one iteration, which samples seven prompts by twos."""
    short = {"num_iterations": 1, "steps_per_iteration": 1, "per_device_train_batch_size": 2}
    short |= {"max_completion_length": 5, "generation_batch_size": 2}
    prompts = ["a", "b c", "d", "e f g", "h", "a a", "b"]
    return small_trainer(directory, rewards, MODEL, prompts, **{**short, **options})


def test_an_exploration_is_what_it_would_be_one_after_the_other(tmp_path):
    """Nothing of the sampling thread's is seen while scoring: not its modes, and not the global random numbers."""
    modes = set()

    def by_chance(completions):
        modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        time.sleep(0.01)
        return torch.rand(len(completions))

    trainer = trainer_of(tmp_path, by_chance, bf16=True)
    torch.manual_seed(5)
    trainer.explore(0)
    after = torch.rand(1)

    torch.manual_seed(5)
    expected = torch.cat([torch.rand(n) for n in (2, 2, 2, 1)]).tolist()
    assert trainer.pool.rewards[:, 0].tolist() == expected and torch.rand(1) == after
    assert modes == {(True, False, False)}
    trainer.pool.quantize()
    sampling = Sampling(5, 1, 1.0, 1.0)
    uniforms = sampling.uniforms(7, trainer.args.seed, 0)
    for i, drawn in enumerate(trainer.pool):
        with torch.autocast("cpu", torch.bfloat16):
            alone = sample(
                MODEL, [drawn.prompt_ids.tolist()], sampling, uniforms[i : i + 1], end_ids=[9], vocab_size=10
            )
        assert drawn.completion_ids.tolist() == alone[0]


def test_the_terms_of_a_sum_are_in_the_pool_and_in_the_log(tmp_path):
    def length(completion_ids, **_):
        return [len(ids) for ids in completion_ids]

    def share_of_a(completion_ids, **_):
        return [None if 2 in ids else ids.count(0) / len(ids) for ids in completion_ids]

    options = {"reward_weights": [0.5, 2.0], "max_unscored_share": 0.9, "on_collapse": "warn"}
    trainer_of(tmp_path, [length, share_of_a], **options).train()
    pool = DataPool.load(tmp_path / "pool", 2, ("reward",))
    pool.quantize()
    assert list(pool.terms) == ["length", "share_of_a"] and len(pool) >= 2
    for i, drawn in enumerate(pool):
        ids = drawn.completion_ids.tolist()
        assert pool.terms["length"][i] == len(ids) and pool.terms["share_of_a"][i] == ids.count(0) / len(ids)
        assert pool.rewards[i, 0] == 0.5 * len(ids) + 2 * ids.count(0) / len(ids)
    (explored,) = logs_of(tmp_path, "pool_size")
    assert explored["score.length"] == pytest.approx(pool.terms["length"].mean())
    assert explored["score.share_of_a"] == pytest.approx(pool.terms["share_of_a"].mean())


def test_a_second_run_pays_for_nothing_that_the_first_has_paid_for(tmp_path):
    class Paid:
        identity = {"version": 1}  # noqa: RUF012
        reads = ("completions",)

        def __init__(self):
            self.scored = []

        def __call__(self, completions):
            self.scored += completions
            return [len(text) for text in completions]

    bills = []
    for run in ("first", "second"):
        reward = Paid()
        trainer = trainer_of(tmp_path / run, reward, score_cache=str(tmp_path / "scores.sqlite"))
        trainer.train()
        assert len(trainer.pool) == 7
        bills.append(reward.scored)
    assert bills[0] and len(bills[0]) == len(set(bills[0])) and bills[1] == []


# Batches


def test_batches_are_padded_on_the_right_and_labelled_at_completions_only():
    batch = build_batch([[7], [8, 9, 7]], [[5, 0, 6], [4]])
    assert batch["input_ids"].tolist() == [[7, 5, 0, 6], [8, 9, 7, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, 0, 6], [-100, -100, -100, 4]]
    batch = build_batch([[7], [8, 9, 7]], [[5], [4, 3]])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 5, -100, -100, -100], [-100, -100, -100, 4, 3]]
