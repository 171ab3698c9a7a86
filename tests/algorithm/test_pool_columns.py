"""The columns of a pool: they grow, read back what was appended, and convert to and from Arrow tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from quarkrl.algorithm import pool_columns
from quarkrl.algorithm.pool_columns import NewSamples, SampleColumns, TokenLists, read_samples


def new_samples(prompts, completions, rewards, terms=None) -> NewSamples:
    """Return samples with one reward each."""
    lists = TokenLists.from_lists(prompts), TokenLists.from_lists(completions)
    return NewSamples.convert(*lists, rewards, terms or {}, num_attributes=1)


def samples_of(columns: SampleColumns) -> list[tuple[list[int], list[int]]]:
    return [tuple(ids.tolist() for ids in columns.token_ids(i)) for i in range(len(columns))]


@pytest.mark.parametrize("block_length", [1, 4, 7, 1 << 20])
def test_token_ids_are_read_as_they_were_appended_across_blocks(block_length, monkeypatch):
    monkeypatch.setattr(pool_columns, "_BLOCK_LENGTH", block_length)
    samples = [([1, 2, 3], [4]), ([], [5, 6, 7, 8, 9, 10, 11, 12, 13]), ([14], []), ([15, 16, 17], [18, 19])]
    columns = SampleColumns(1)
    for iteration, part in enumerate((samples[:1], samples[1:1], samples[1:])):
        prompts, completions = ([sample[i] for sample in part] for i in range(2))
        columns.append(new_samples(prompts, completions, np.zeros(len(part))), iteration)
    assert samples_of(columns) == samples
    assert columns.iterations.tolist() == [0, 2, 2, 2]


def test_lengths_count_the_tokens_of_prompt_and_completion():
    columns = SampleColumns(1)
    columns.append(new_samples([[1, 2], [], [3]], [[4], [5, 6, 7], []], [0, 0, 0]), 0)
    columns.append(new_samples([[8] * 9], [[9]], [0]), 1)
    assert columns.lengths_of(np.arange(4)).tolist() == [3, 3, 1, 10]
    assert columns.lengths_of(np.array([3, 0, 0, 2, 1])).tolist() == [10, 3, 3, 1, 3]


def test_new_samples_have_no_quantile():
    columns = SampleColumns(2)
    lists = TokenLists.from_lists([[1]])
    columns.append(NewSamples.convert(lists, lists, [[0.5, 0.25]], {}, num_attributes=2), 0)
    assert columns.quantiles.tolist() == [[-1, -1]] and columns.rewards.tolist() == [[0.5, 0.25]]


def test_any_range_of_samples_converts_to_a_table_and_back():
    columns = SampleColumns(1)
    columns.append(new_samples([[1], [2, 3]], [[], [4]], [0.5, -1]), 0)
    columns.append(new_samples([[5, 6], []], [[7, 8], [9]], [2, 3], {"kind": [1.5, 1.5]}), 1)
    for start in range(4):
        for end in range(start + 1, 5):
            restored = read_samples(columns.to_table(slice(start, end), ["reward"]), ["reward"])
            copy = SampleColumns(1)
            copy.append(restored, 0)
            assert samples_of(copy) == samples_of(columns)[start:end]
            assert copy.rewards.tolist() == columns.rewards[start:end].tolist()
            np.testing.assert_array_equal(copy.terms["kind"], columns.terms["kind"][start:end])


def test_token_lists_from_arrow_start_at_any_offset():
    column = pa.array([[1, 2], [3], [], [4, 5]], pa.list_(pa.int64())).slice(1)
    lists = TokenLists.from_arrow(column)
    assert lists.lengths.tolist() == [1, 0, 2] and lists.ids.tolist() == [3, 4, 5]
    assert lists.ids.dtype == np.int32
