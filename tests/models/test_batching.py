"""Padded batches by hand, and how items are grouped by length."""

from __future__ import annotations

import torch

from quarkrl.models.batching import batches_by_length, build_batch, left_pad, right_pad, split_by_length


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


def test_a_batch_is_split_into_parts_of_similar_length_without_their_padding():
    batch = build_batch([[1], [2, 2, 2], [3], [4, 4]], [[9], [9, 9], [9, 9], [9]])
    batch |= {f"ref_{name}": tensor for name, tensor in build_batch([[], [2, 2], [], [4]], [[9]] * 4).items()}
    parts = list(split_by_length(batch, 6))
    # Rows of 2 and 3 tokens fit into 6 positions. A row of 3 tokens and one of 5 do not.
    assert [part["input_ids"].tolist() for part in parts] == [
        [[1, 9, 0], [3, 9, 9]],
        [[4, 4, 9]],
        [[2, 2, 2, 9, 9]],
    ]
    assert [part["ref_input_ids"].tolist() for part in parts] == [[[9], [9]], [[4, 9]], [[2, 2, 9]]]
    assert parts[0]["labels"].tolist() == [[-100, 9, -100], [-100, 9, 9]]


def test_a_small_batch_is_not_split_and_a_long_row_is_a_part():
    batch = build_batch([[1], [2, 2, 2]], [[9], [9, 9]])
    assert [part["input_ids"].tolist() for part in split_by_length(batch, 10)] == [batch["input_ids"].tolist()]
    assert [part["input_ids"].shape for part in split_by_length(batch, 1)] == [(1, 2), (1, 5)]
