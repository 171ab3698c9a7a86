"""Prompts for each iteration: a streamed data set is explored group by group, and a resumed run continues exactly."""

from __future__ import annotations

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from helpers.eight_letters import PROMPTS
from helpers.errors import error_message
from helpers.runs import KillBefore, assert_same_pool, assert_same_weights, distinct_rewards, small_trainer, weights_of

STREAMED = {"num_iterations": 3, "steps_per_iteration": 2, "prompts_per_iteration": 3}


def stream() -> IterableDataset:
    texts = [" ".join(f"{a} {b}") for a in "abcdefgh" for b in "abcdefgh"]
    rows = Dataset.from_dict({"prompt": texts, "number": list(range(64))})
    return rows.to_iterable_dataset().shuffle(seed=1, buffer_size=16)


def trainer_of(directory, **options):
    return small_trainer(directory, distinct_rewards, prompts=stream(), **{**STREAMED, **options})


def stop_run(directory, step: int) -> None:
    """Start a run that saves a checkpoint at each step, and end it before a step."""
    trainer = trainer_of(directory, save_strategy="steps", save_steps=1, callbacks=[KillBefore(step)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_each_iteration_explores_the_next_prompts_of_the_stream(tmp_path):
    numbers: list[int] = []

    def reward(completions, number, **_):
        numbers.extend(number)
        return [float(len(text) + i) for i, text in enumerate(completions)]

    trainer = small_trainer(tmp_path, reward, prompts=stream(), samples_per_prompt=2, **STREAMED)
    trainer.train()
    expected = [row["number"] for row in stream().take(9)]
    assert [sorted(numbers[i : i + 6]) for i in range(0, 18, 6)] == [
        sorted(2 * expected[i : i + 3]) for i in range(0, 9, 3)
    ]
    assert len(trainer.pool) == 18


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_stopped_between_or_within_iterations_continues_exactly(tmp_path, step):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    stop_run(tmp_path / "stopped", step)
    resumed = trainer_of(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    assert_same_pool(whole.pool, resumed.pool)
    assert_same_weights(weights_of(whole.model), weights_of(resumed.model))


def test_another_stream_is_another_run(tmp_path):
    stop_run(tmp_path, 1)
    other = small_trainer(tmp_path, distinct_rewards, prompts=stream().skip(1), **STREAMED)
    error_message(lambda: other.train(resume_from_checkpoint=True), "other prompts")


def test_a_stream_needs_prompts_per_iteration(tmp_path):
    error_message(
        lambda: trainer_of(tmp_path, prompts_per_iteration=None), "prompts_per_iteration None: must be a number"
    )


def test_held_out_prompts_are_not_streamed(tmp_path):
    error_message(lambda: small_trainer(tmp_path, eval_dataset=stream()), "must be finite", "dataset.take(1000)")


def test_a_data_set_of_several_splits_is_refused_by_the_name_of_the_argument(tmp_path):
    splits = DatasetDict(train=Dataset.from_dict({"prompt": PROMPTS}), test=Dataset.from_dict({"prompt": PROMPTS}))
    pieces = "must be one split, not a DatasetDict of 'train', 'test'", "dataset['train']"
    error_message(lambda: small_trainer(tmp_path, prompts=splits), "train_dataset: ", *pieces)
    error_message(lambda: small_trainer(tmp_path, eval_dataset=splits), "eval_dataset: ", *pieces)
    streamed = datasets.IterableDatasetDict(train=stream())
    error_message(lambda: small_trainer(tmp_path, prompts=streamed), "not a IterableDatasetDict of 'train'")
