"""The pool as a table for people: quantiles of the whole pool, several attributes, and files without texts."""

from __future__ import annotations

import numpy as np
import pytest

from quarkrl.algorithm.pool import DataPool
from quarkrl.algorithm.pool_table import attributes_of, read_pool_table
from quarkrl.errors import UserError


def save_pool(directory, rewards_by_iteration, attributes=("reward",), texts=True):
    pool = DataPool(2, attributes)
    for iteration, rewards in enumerate(rewards_by_iteration):
        count = len(rewards)
        pool.add([[1]] * count, [[2, 3]] * count, np.array(rewards), iteration=iteration)
        columns = {"prompt": [f"p{i}" for i in range(count)], "completion": [f" c{reward}" for reward in rewards]}
        pool.save(directory, texts={iteration: columns} if texts else None)
    return directory


def test_a_table_has_texts_and_quantiles_of_the_whole_pool(tmp_path):
    table = read_pool_table(save_pool(tmp_path, [[0.1, 0.9], [0.2, 0.3]]), num_quantiles=2)
    assert table["iteration"].to_pylist() == [0, 0, 1, 1]
    # Of 0.1, 0.2, 0.3 and 0.9, the upper half starts at 0.3.
    assert table["quantile"].to_pylist() == [0, 1, 0, 1]
    assert table["completion"].to_pylist() == [" c0.1", " c0.9", " c0.2", " c0.3"]
    assert attributes_of(table) == ["reward"] and "prompt_ids" not in table.column_names


def test_the_reward_ceiling_of_the_run_moves_the_edge(tmp_path):
    table = read_pool_table(save_pool(tmp_path, [[0.1, 0.8, 0.9, 1.0]]), num_quantiles=2, ceiling=0.8)
    assert table["quantile"].to_pylist() == [0, 1, 1, 1]


def test_each_of_several_attributes_has_its_own_quantile(tmp_path):
    rewards = [[[0.1, 5.0], [0.9, 4.0]]]
    table = read_pool_table(save_pool(tmp_path, rewards, ("polite", "short")), num_quantiles=2)
    assert attributes_of(table) == ["polite", "short"]
    assert table["quantile.polite"].to_pylist() == [0, 1] and table["quantile.short"].to_pylist() == [1, 0]


def test_texts_of_an_older_file_are_decoded(tmp_path):
    save_pool(tmp_path, [[0.1, 0.9]], texts=False)
    table = read_pool_table(tmp_path, 2, decode=lambda prompts, completions: (map(str, prompts), map(str, completions)))
    assert table["prompt"].to_pylist() == ["[1]", "[1]"] and table["completion"].to_pylist() == ["[2, 3]"] * 2


def test_a_pool_without_samples_and_a_damaged_file_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"must hold samples, and has none yet\."):
        read_pool_table(tmp_path, 2)
    (tmp_path / "iteration-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"iteration-000000.parquet: must be an undamaged pool file"):
        read_pool_table(tmp_path, 2)
