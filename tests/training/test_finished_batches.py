"""Finished batches of an interrupted exploration: what is on the disk is not sampled again."""

from __future__ import annotations

import numpy as np
from helpers.files import files_of

from quarkrl.training.rollout import FinishedBatches, Rollout, remaining_batches


def test_finished_batches_come_back_and_the_rest_is_left_to_do(tmp_path):
    rows = list(range(100, 112))
    batches = FinishedBatches(tmp_path / "partial")
    for start in (0, 8):
        rewards = np.array([[0.5, np.nan, 2.0, 1.0]]).T
        part = Rollout(rows[start : start + 4], [[1, 2], [3], [4], [5, 6, 7]], rewards, 0.25, 0.5, start)
        part.terms["kind"] = np.arange(4.0)
        batches.keep(part)
    found = batches.load(rows)
    assert [part.start for part in found] == [0, 8] and found[0].rows == rows[:4]
    assert found[1].completions == [[1, 2], [3], [4], [5, 6, 7]] and found[1].terms["kind"].tolist() == [0, 1, 2, 3]
    assert np.array_equal(found[0].rewards[:, 0], [0.5, np.nan, 2, 1], equal_nan=True)
    assert remaining_batches(12, 4, found) == [slice(4, 8)]
    assert remaining_batches(12, 3, found) == [slice(4, 7), slice(7, 8)]  # After a smaller generation_batch_size.
    assert remaining_batches(12, 5, []) == [slice(0, 5), slice(5, 10), slice(10, 12)]
    assert batches.load(rows[::-1]) == []  # Of other prompts.
    path = tmp_path / "partial/000000000.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert [part.start for part in batches.load(rows)] == [8]
    batches.clear()
    assert files_of(tmp_path) == set()
