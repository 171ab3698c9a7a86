"""Padded batches by hand, and how items are grouped by length."""

from __future__ import annotations

import torch

from quarkrl.models.batching import batches_by_length, build_batch, left_pad, right_pad


def test_padding_on_the_left_by_hand():
    ids, mask = left_pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_padding_on_the_right_by_hand():
    ids, mask = right_pad([[1, 2, 3], [4]])
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_ids_are_whole_numbers_even_without_any():
    for pad in (left_pad, right_pad):
        ids, mask = pad([[], []])
        assert ids.shape == mask.shape == (2, 0)
        assert ids.dtype == mask.dtype == torch.long


def test_a_batch_by_hand():
    batch = build_batch([[1, 2], [3]], [[4], [5, 6, 7]])
    assert batch["input_ids"].tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 4, -100], [-100, 5, 6, 7]]


def test_a_token_with_the_padding_id_counts_where_it_is_no_padding():
    batch = build_batch([[0, 7], [8]], [[0], [9]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 0], [-100, 9, -100]]


def test_batches_go_from_short_to_long():
    assert list(batches_by_length("abcde", [5, 1, 4, 2, 3], 2)) == [["b", "d"], ["e", "c"], ["a"]]
    assert list(batches_by_length([], [], 2)) == []


def test_a_batch_has_at_most_4096_padded_positions_or_one_item():
    assert [len(batch) for batch in batches_by_length(range(5), [2000] * 5, 128)] == [2, 2, 1]
    assert [len(batch) for batch in batches_by_length(range(3), [2048] * 3, 128)] == [2, 1]
    assert [len(batch) for batch in batches_by_length([0, 1], [9000, 9000], 128)] == [1, 1]
