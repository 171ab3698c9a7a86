"""The collator: batches of draws, and what a spawned worker of the data loader receives."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from helpers.reward_token_models import reward_tokens
from helpers.runs import small_trainer

from quarkrl.algorithm.pool import DataPool
from quarkrl.training.collation import Collator


@pytest.fixture
def collator() -> Collator:
    """Draws of samples 2, 0 and 2 from a pool of 1,000; sample i is the prompt [i] and the completion [i, i]."""
    pool = DataPool(2)
    numbers = range(1_000)
    pool.add([[i] for i in numbers], [[i, i] for i in numbers], [float(i) for i in numbers], iteration=0)
    pool.quantize()
    made = Collator(reward_tokens(("reward",), ((5_000, 5_001),), (), 5_000))
    made.set_iteration(pool, np.array([2, 0, 2]), with_reference=True, contrast=None)
    return made


def test_a_batch_by_hand(collator):
    batch = collator([0, 1])
    assert batch["input_ids"].tolist() == [[5_000, 2, 2, 2], [5_000, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 2, 2], [-100, -100, 0, 0]]
    assert batch["ref_input_ids"].tolist() == [[2, 2, 2], [0, 0, 0]]


def test_a_pickled_collator_makes_the_same_batches_and_has_the_drawn_samples_only(collator):
    restored = pickle.loads(pickle.dumps(collator))
    assert [sample.prompt_ids.tolist() for sample in restored.samples] == [[0], [2]]
    for name, tensor in collator(range(3)).items():
        assert torch.equal(restored(range(3))[name], tensor)
    assert len(collator.samples) == 1_000


def test_all_that_the_data_loader_gives_to_a_worker_can_be_pickled(tmp_path):
    trainer = small_trainer(tmp_path, dataloader_num_workers=1, dataloader_multiprocessing_context="spawn")
    trainer.begin_epoch(0)
    loader = trainer.get_train_dataloader()
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    dataset, collate, _ = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
    for name, tensor in trainer.collate(range(8)).items():
        assert torch.equal(collate([dataset[i] for i in range(8)])[name], tensor)
