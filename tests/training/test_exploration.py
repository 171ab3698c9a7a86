"""Which prompts an iteration explores, what came of it, and how drawn samples become batches."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_model, tiny_tokenizer

from quarkrl import QuarkConfig, QuarkTrainer
from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError
from quarkrl.models.batching import build_batch
from quarkrl.rewards import Scorer, Scores
from quarkrl.sampling.sampler import sample
from quarkrl.sampling.strategy import Sampling
from quarkrl.training.exploration import Rollout, batches_left, side_by_side


def rollout(rewards, completions=None, rows=None, start: int = 0) -> Rollout:
    rewards = np.array(rewards, dtype=float)
    n = len(rewards)
    return Rollout(rows or list(range(n)), completions or [[1]] * n, rewards.reshape(n, -1), 1.0, 2.0, start)


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


def test_the_terms_of_a_sum_join_and_are_told_by_their_means():
    parts = [rollout([3.0, np.nan]), rollout([1.0], start=2)]
    for part, own in zip(parts, ([1, 9], [0.5]), strict=True):
        part.terms["kind"] = np.array(own, dtype=float)
    whole = Rollout.join(parts)
    assert whole.terms["kind"].tolist() == [1, 9, 0.5]
    assert whole.figures(("reward",), [])["score.kind"] == 0.75  # The second has no reward.


# Scoring beside sampling


def beside(sample, score, batches=6, stop=lambda: None) -> list[Rollout]:
    """Batches of two completions."""
    rows = list(range(100, 100 + 2 * batches))
    return side_by_side(sample, score, rows, batches_left(2 * batches, 2, []), stop)


def completions_of(batch: slice) -> list[list[int]]:
    return [[i] for i in range(batch.start, batch.stop)]


def scores_of(batch: slice, completions: list[list[int]]) -> Scores:
    column = np.array(completions, dtype=float)
    return Scores(column, column, {"half": column[:, 0] / 2})


def scoring_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("score")]


def test_batches_come_in_order_with_their_rows_and_terms():
    whole = Rollout.join(beside(completions_of, scores_of))
    assert whole.rows == list(range(100, 112)) and whole.completions == [[i] for i in range(12)]
    assert whole.rewards[:, 0].tolist() == list(range(12))
    assert whole.terms["half"].tolist() == [i / 2 for i in range(12)]


def test_the_next_batch_is_sampled_while_one_is_scored():
    def slow_sample(batch):
        time.sleep(0.05)
        return completions_of(batch)

    def slow_score(batch, completions):
        time.sleep(0.06)
        return scores_of(batch, completions)

    began = time.perf_counter()
    parts = beside(slow_sample, slow_score)
    took = time.perf_counter() - began
    assert 0.05 + 6 * 0.06 <= took < 0.55  # One after the other: 0.66.
    whole = Rollout.join(parts)
    assert whole.seconds_sample == pytest.approx(0.3, abs=0.05) and whole.seconds_score == pytest.approx(0.36, abs=0.06)


def test_one_batch_is_scored_at_a_time_in_one_thread_in_order():
    seen: list[tuple[int, int]] = []

    def slow_score(batch, completions):
        seen.append((batch.start, threading.get_ident()))
        time.sleep(0.01)
        seen.append((batch.start, threading.get_ident()))
        return scores_of(batch, completions)

    beside(completions_of, slow_score, batches=4)
    assert [start for start, _ in seen] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert len({thread for _, thread in seen}) == 1 and seen[0][1] != threading.get_ident()


def test_after_an_error_in_scoring_nothing_more_is_sampled():
    begun, failed, sampled = threading.Event(), threading.Event(), []

    def watched_sample(batch):
        sampled.append(batch.start)
        if batch.start:
            begun.set()
            failed.wait(10)
            time.sleep(0.05)
        return completions_of(batch)

    def broken(batch, completions):
        begun.wait(10)
        failed.set()
        raise UserError("quota")

    with pytest.raises(UserError, match="quota"):
        beside(watched_sample, broken)
    assert sampled == [0, 2] and not scoring_threads()


def test_after_an_error_in_sampling_scoring_is_stopped():
    stopped = threading.Event()

    def broken(batch):
        if batch.start == 4:
            raise RuntimeError("out of memory")
        return completions_of(batch)

    scored = []

    def endless(batch, completions):
        scored.append(batch.start)
        assert stopped.wait(30)
        return scores_of(batch, completions)

    with pytest.raises(RuntimeError, match="out of memory"):
        beside(broken, endless, stop=stopped.set)
    assert scored == [0] and not scoring_threads()


def test_ctrl_c_ends_a_reward_that_waits_and_leaves_no_thread():
    ended = []

    async def endless(completions):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    scorer = Scorer(endless)

    def wait_for_scores(batch, completions):
        return scorer(["p"] * 2, ["x"] * 2, completions)

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        beside(completions_of, wait_for_scores, stop=scorer.stop)
    assert time.perf_counter() - began < 10
    assert ended == [True] and not scoring_threads()


WORDS = tiny_tokenizer(words=[*"abcdefgh"])
MODEL = tiny_model("gpt2", WORDS)


def trainer_of(directory, rewards, **options) -> QuarkTrainer:
    small = {"num_quantiles": 2, "num_iterations": 1, "steps_per_iteration": 1, "per_device_train_batch_size": 2}
    small |= {"max_completion_length": 5, "min_completion_length": 1, "generation_batch_size": 2}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "save_strategy": "no"}
    config = QuarkConfig(output_dir=str(directory), **{**small, **quiet, **options})
    prompts = ["a", "b c", "d", "e f g", "h", "a a", "b"]
    return QuarkTrainer(tiny_model("gpt2", WORDS), rewards, config, prompts, processing_class=WORDS)


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
        return [None if 7 in ids else ids.count(0) / len(ids) for ids in completion_ids]

    options = {"reward_weights": [0.5, 2.0], "max_unscored_share": 0.9, "on_collapse": "warn"}
    trainer_of(tmp_path, [length, share_of_a], **options).train()
    pool = DataPool.load(tmp_path / "pool", 2, ("reward",))
    pool.quantize()
    assert list(pool.terms) == ["length", "share_of_a"] and len(pool) >= 2
    for i, drawn in enumerate(pool):
        ids = drawn.completion_ids.tolist()
        assert pool.terms["length"][i] == len(ids) and pool.terms["share_of_a"][i] == ids.count(0) / len(ids)
        assert pool.rewards[i, 0] == 0.5 * len(ids) + 2 * ids.count(0) / len(ids)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (explored,) = [entry for entry in logged if "pool_size" in entry]
    assert explored["score.length"] == pytest.approx(pool.terms["length"].mean())
    assert explored["score.share_of_a"] == pytest.approx(pool.terms["share_of_a"].mean())


def test_a_second_run_pays_for_nothing_that_the_first_has_paid_for(tmp_path):
    class Paid:
        identity = {"version": 1}  # noqa: RUF012
        reads = ("completions",)

        def __init__(self):
            self.asked = []

        def __call__(self, completions):
            self.asked += completions
            return [len(text) for text in completions]

    bills = []
    for run in ("first", "second"):
        reward = Paid()
        trainer = trainer_of(tmp_path / run, reward, score_cache=str(tmp_path / "scores.sqlite"))
        trainer.train()
        assert len(trainer.pool) == 7
        bills.append(reward.asked)
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
