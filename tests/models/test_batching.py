"""Batches: padded tensors of prompts and completions."""

from __future__ import annotations

from quarkrl.models.batching import padded


def test_a_batch_by_hand():
    batch = padded([[1, 2], [3]], [[4], [5, 6, 7]])
    assert batch["input_ids"].tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 4, -100], [-100, 5, 6, 7]]
