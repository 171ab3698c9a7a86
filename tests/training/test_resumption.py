"""The pool of a resumed run: the samples of each iteration whose learning had begun, and no others."""

from __future__ import annotations

import pytest

from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError
from quarkrl.training.resumption import count_begun_iterations, load_pool


@pytest.fixture
def directory(tmp_path):
    """A pool directory with iterations 0 to 2, of two samples each."""
    pool = DataPool(2)
    for iteration in range(3):
        pool.add([[1], [2]], [[iteration], [9]], [0.0, 1.0], iteration=iteration)
    pool.save(tmp_path)
    return tmp_path


# Three steps per iteration: steps 1 to 3 belong to iteration 0, steps 4 to 6 to iteration 1.
@pytest.mark.parametrize(("step", "begun"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3), (9, 3)])
def test_an_iteration_has_begun_once_its_first_step_is_done(directory, step, begun):
    assert count_begun_iterations(step, 3) == begun
    pool = load_pool(DataPool(2), directory, count_begun_iterations(step, 3))
    assert pool.iterations.tolist() == [iteration for iteration in range(begun) for _ in range(2)]


def test_a_missing_iteration_that_had_begun_is_an_error(directory):
    (directory / "iteration-000001.parquet").unlink()
    assert len(load_pool(DataPool(2), directory, 1)) == 2
    with pytest.raises(UserError, match=r"iteration-000001\.parquet is missing"):
        load_pool(DataPool(2), directory, 2)
