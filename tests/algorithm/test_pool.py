"""The data pool: quantiles by hand, samples as they were added, draws, and files."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.statistics import chi_square
from hypothesis import given, settings
from hypothesis import strategies as st

from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError
from quarkrl.storage.parquet import write_table


def pool_of(rewards, num_quantiles: int, attributes=("reward",), ceiling: float | None = None) -> DataPool:
    """Return a quantized pool whose sample i has prompt [i] and completion [100 + i]."""
    pool = DataPool(num_quantiles, attributes)
    n = len(rewards)
    pool.add([[i] for i in range(n)], [[100 + i] for i in range(n)], rewards, iteration=0)
    pool.quantize(ceiling)
    return pool


def quantiles_of(rewards, num_quantiles: int, ceiling: float | None = None) -> list[int]:
    return pool_of(rewards, num_quantiles, ceiling=ceiling).quantiles[:, 0].tolist()


def assert_equal_samples(a: DataPool, b: DataPool) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.prompt_ids.tolist() == y.prompt_ids.tolist()
        assert x.completion_ids.tolist() == y.completion_ids.tolist()
    assert np.array_equal(a.rewards, b.rewards) and np.array_equal(a.iterations, b.iterations)


# Quantiles


@pytest.mark.parametrize(
    ("rewards", "num_quantiles", "expected"),
    [
        ([0.1, 0.9], 2, [0, 1]),
        ([0.9, 0.1], 2, [1, 0]),
        ([5, 1, 4, 2, 3, 6], 3, [2, 0, 1, 0, 1, 2]),
        ([0, 1, 2, 3, 4], 5, [0, 1, 2, 3, 4]),  # As many samples as quantiles.
        # Ranks 0..6 in five parts, edges at ranks ceil(7k/5) = 2, 3, 5, 6: sizes 2, 1, 2, 1, 1.
        ([0, 1, 2, 3, 4, 5, 6], 5, [0, 0, 1, 2, 2, 3, 4]),
        ([0, 1, 2], 2, [0, 0, 1]),  # The edge is at rank ceil(3/2) = 2.
        ([-3.0, -1.0, -2.0], 3, [0, 2, 1]),
    ],
)
def test_quantiles_by_hand(rewards, num_quantiles, expected):
    assert quantiles_of(rewards, num_quantiles) == expected


@pytest.mark.parametrize(
    ("rewards", "num_quantiles", "expected"),
    [
        # Ranks 0 1 | 2 3 | 4 5: the three 1s have ranks 1 to 3, and rank 3 is in quantile 1.
        ([0, 1, 1, 1, 2, 3], 3, [0, 1, 1, 1, 2, 2]),
        ([0, 0, 0, 1, 2, 3], 3, [0, 0, 0, 1, 2, 2]),  # The lowest reward is always the worst quantile.
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 1], 5, [0] * 9 + [4]),  # A common lowest reward, and a rare better one.
        ([0, 0, 1, 1, 1, 1, 1, 1, 1, 1], 5, [0, 0, 4, 4, 4, 4, 4, 4, 4, 4]),
        ([0, 1, 2, 9, 9, 9], 3, [0, 0, 1, 2, 2, 2]),
        ([1, 1, 1, 1], 2, [1, 1, 1, 1]),  # The best quantile is never empty.
        ([0, 1, 1, 1, 1], 5, [0, 4, 4, 4, 4]),
    ],
)
def test_equal_rewards_share_the_quantile_of_the_highest_ranked(rewards, num_quantiles, expected):
    assert quantiles_of(rewards, num_quantiles) == expected
    assert quantiles_of(rewards[::-1], num_quantiles) == expected[::-1]  # In any order of insertion.


@settings(max_examples=150, deadline=None)
@given(count=st.integers(2, 200), num_quantiles=st.integers(2, 20), seed=st.integers(0, 2**32 - 1))
def test_without_ties_sizes_differ_by_at_most_one_and_quantiles_follow_ranks(count, num_quantiles, seed):
    num_quantiles = min(num_quantiles, count)
    rewards = np.random.default_rng(seed).permutation(count)
    quantiles = np.array(quantiles_of(rewards, num_quantiles))
    sizes = np.bincount(quantiles, minlength=num_quantiles)
    assert sizes.sum() == count and sizes.max() - sizes.min() <= 1
    assert (np.diff(quantiles[np.argsort(rewards)]) >= 0).all()


@settings(max_examples=150, deadline=None)
@given(
    rewards=st.lists(st.integers(0, 6), min_size=8, max_size=60),
    num_quantiles=st.integers(2, 8),
    ceiling=st.none() | st.integers(-1, 7),
)
def test_a_quantile_is_the_number_of_edges_reached(rewards, num_quantiles, ceiling):
    pool = pool_of(rewards, num_quantiles, ceiling=ceiling)
    (edges,), quantiles = pool.edges, pool.quantiles[:, 0]
    assert edges.shape == (num_quantiles - 1,) and (np.diff(edges) >= 0).all()
    assert quantiles.tolist() == [int((reward >= edges).sum()) for reward in rewards]
    assert quantiles.tolist() == np.searchsorted(edges, rewards, side="right").tolist()
    assert quantiles[np.argmax(rewards)] == num_quantiles - 1


def test_each_attribute_has_quantiles_of_its_own():
    pool = pool_of([[0, 3], [1, 2], [2, 1], [3, 0]], 2, ("kind", "brief"))
    assert pool.quantiles.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert pool.edges.tolist() == [[2], [2]]
    assert pool.attributes == ("kind", "brief")


def test_a_sample_moves_to_a_lower_quantile_when_better_ones_arrive():
    pool = pool_of([0.1, 0.2, 0.3, 0.4], 2)
    assert pool.quantiles[:, 0].tolist() == [0, 0, 1, 1]
    pool.add([[9]] * 4, [[9]] * 4, [0.5, 0.6, 0.7, 0.8], iteration=1)
    assert pool.quantiles[:, 0].tolist() == [0, 0, 1, 1, -1, -1, -1, -1]  # Not quantized yet.
    pool.quantize()
    assert pool.quantiles[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_an_error_names_too_few_samples_and_the_option_to_lower():
    pool = DataPool(5)
    pool.add([[1]] * 4, [[2]] * 4, [1, 2, 3, 4], iteration=0)
    with pytest.raises(UserError, match=r"num_quantiles 5: .* 4\. .*--num_quantiles"):
        pool.quantize()


def test_an_error_names_a_single_quantile():
    with pytest.raises(UserError, match="num_quantiles 1: must be at least 2"):
        DataPool(1)


def test_a_note_says_once_that_ties_leave_quantiles_empty(caplog):
    pool = pool_of([[0, 0], [1, 1], [1, 2], [1, 3], [1, 4], [1, 5]], 3, ("kind", "brief"))
    pool.quantize()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("kind: 83% of the samples share the reward 1, so 2 of 3 quantiles have samples: 0, 2.")
    assert "--num_quantiles 2" in message


def test_there_is_no_warning_if_all_rewards_are_equal(caplog):
    pool_of([1, 1, 1, 1], 2)
    assert not caplog.records


# The reward ceiling

TEN = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("ceiling", "expected"),
    [
        (None, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (99, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),  # No reward reaches it.
        (9, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),  # One of ten rewards reaches it, at most a fifth.
        (8, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        # Six reach 4; ranks 0..3 form four quantiles.
        (4, [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]),
        # Four reach 6; ranks 0..5 in four parts, edges at ranks ceil(6k/4) = 2, 3, 5.
        (6, [0, 0, 1, 2, 2, 3, 4, 4, 4, 4]),
        (0, [4] * 10),  # All rewards reach it.
        (-7, [4] * 10),
    ],
)
def test_samples_that_reach_the_ceiling_form_the_best_quantile(ceiling, expected):
    assert quantiles_of(TEN, 5, ceiling) == expected


def test_the_ceiling_with_two_quantiles_and_with_fewer_samples_below_it_than_quantiles():
    assert quantiles_of([0, 1, 2, 3], 2, ceiling=1) == [0, 1, 1, 1]
    # The only sample below the ceiling is the worst.
    assert quantiles_of([0, 1, 2, 3, 4], 5, ceiling=1) == [0, 4, 4, 4, 4]


def test_the_ceiling_applies_to_each_attribute():
    pool = pool_of([[i, -i] for i in TEN], 2, ("up", "down"), ceiling=2)
    assert pool.quantiles[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert pool.quantiles[:, 1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]  # -i never reaches 2.


# Samples

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)
samples = st.lists(st.tuples(ids, ids, st.floats(allow_nan=False, allow_infinity=False, width=32)), max_size=8)


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(samples, min_size=1, max_size=4))
def test_a_sample_is_read_as_it_was_added(batches):
    pool = DataPool(2)
    pool.add([[1], [2]], [[3], [4]], [0.0, 1.0], iteration=0)
    for iteration, batch in enumerate(batches, 1):
        prompts, completions, rewards = ([row[i] for row in batch] for i in range(3))
        pool.add(prompts, completions, rewards, iteration=iteration)
    pool.quantize()
    flat = [(*row, i) for i, batch in enumerate(batches, 1) for row in batch]
    assert len(pool) == 2 + len(flat)
    for index, (prompt, completion, reward, iteration) in enumerate(flat, 2):
        for i in (index, index - len(pool)):  # From either end.
            assert pool[i].prompt_ids.tolist() == prompt
            assert pool[i].completion_ids.tolist() == completion
        assert pool.rewards[index, 0] == reward and pool.iterations[index] == iteration
        assert pool[index].quantiles.tolist() == pool.quantiles[index].tolist()


def test_an_empty_completion_is_a_sample():
    pool = DataPool(2)
    pool.add([[1, 2], [3], []], [[], [4, 5], []], [0, 1, 2], iteration=0)
    pool.quantize()
    assert [(s.prompt_ids.tolist(), s.completion_ids.tolist()) for s in pool] == [([1, 2], []), ([3], [4, 5]), ([], [])]


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_out_of_range_is_an_index_error(index):
    with pytest.raises(IndexError):
        pool_of([1, 2, 3], 2)[index]


def test_a_pool_grows_beyond_its_initial_capacity():
    pool = DataPool(3)
    for iteration in range(5):
        prompts = [[iteration, i] for i in range(700)]
        pool.add(prompts, [[i, i, i] for i in range(700)], np.arange(700), iteration=iteration)
    pool.quantize()
    assert len(pool) == 3500
    for i in (0, 511, 1023, 1024, 2047, 2048, 3499):
        assert pool[i].prompt_ids.tolist() == [i // 700, i % 700]
        assert pool[i].completion_ids.tolist() == [i % 700] * 3
        assert pool.rewards[i, 0] == i % 700


def test_adding_nothing_changes_nothing():
    pool = pool_of([1, 2, 3], 2)
    pool.add([], [], [], iteration=1)
    assert len(pool) == 3 and pool.quantiles[:, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf"), None])
def test_a_reward_that_is_not_finite_is_refused_and_nothing_is_added(reward):
    pool = DataPool(2)
    with pytest.raises(ValueError, match="rewards: must be finite"):
        pool.add([[1], [2]], [[1], [2]], [0.5, reward], iteration=0)
    assert len(pool) == 0


@pytest.mark.parametrize(
    ("prompts", "completions", "rewards", "attributes"),
    [
        ([[1]], [[1], [2]], [1.0], 1),
        ([[1], [2]], [[1]], [1.0, 2.0], 1),
        ([[1], [2]], [[1], [2]], [1.0], 1),
        ([[1], [2]], [[1], [2]], [1.0, 2.0], 2),
        ([[1], [2], [3]], [[1], [2], [3]], [[1, 2, 3], [4, 5, 6]], 2),  # (A, n) instead of (n, A).
        ([[1], [2]], [[1], [2]], [1.0, 2.0, 3.0, 4.0], 2),
    ],
)
def test_prompts_completions_and_rewards_must_have_the_same_number(prompts, completions, rewards, attributes):
    pool = DataPool(2, [f"a{i}" for i in range(attributes)])
    with pytest.raises(ValueError, match=r"(completion_ids|rewards) .*must"):
        pool.add(prompts, completions, rewards, iteration=0)
    assert len(pool) == 0


# Draws


def test_draws_are_uniform_over_samples():
    pool = pool_of([0] * 9 + [1], 2)
    drawn = pool.draw(20_000, np.random.default_rng(0))
    assert chi_square(np.bincount(drawn, minlength=10)) < 27.9  # 99.9 % of chi-square with 9 degrees of freedom


def test_balanced_draws_are_uniform_over_quantiles_and_within_them():
    pool = pool_of([0, 5, 5, 5, 5, 5, 5, 7, 8, 9], 5)
    quantiles = pool.quantiles[:, 0]
    sizes = np.bincount(quantiles, minlength=5)
    assert sizes.tolist() == [1, 0, 0, 7, 2]  # The 5s have ranks 1 to 6, and rank 6 is in quantile 3.
    drawn = pool.draw(30_000, np.random.default_rng(0), balanced=True)
    by_quantile = np.bincount(quantiles[drawn], minlength=5)
    assert by_quantile[[1, 2]].tolist() == [0, 0]
    assert chi_square(by_quantile[[0, 3, 4]]) < 13.8  # 2 degrees of freedom
    assert chi_square(np.bincount(drawn, minlength=10)[quantiles == 3]) < 22.5  # 6 degrees of freedom


def test_balanced_draws_are_over_the_combinations_of_quantiles_that_occur():
    pool = pool_of([[0, 0], [1, 1], [2, 2], [3, 4], [4, 3], [5, 5], [6, 6], [7, 7]], 2, ("a", "b"))
    assert pool.quantiles.tolist() == [[0, 0]] * 3 + [[0, 1], [1, 0]] + [[1, 1]] * 3
    counts = np.bincount(pool.draw(9_000, np.random.default_rng(0), balanced=True), minlength=8)
    by_combination = np.array([counts[:3].sum(), counts[3], counts[4], counts[5:].sum()])
    assert chi_square(by_combination) < 16.3  # 3 degrees of freedom


@pytest.mark.parametrize("balanced", [False, True])
def test_equal_generators_give_equal_draws(balanced):
    pool = pool_of(TEN, 5)
    first, second, other = (pool.draw(50, np.random.default_rng(seed), balanced=balanced) for seed in (1, 1, 2))
    assert first.shape == (50,) and first.tolist() == second.tolist() != other.tolist()


def test_a_draw_takes_n_integers_below_the_pools_size_from_the_generator():
    """A resumed run draws what the interrupted run drew, so the generator's use must not change."""
    rng, expected = np.random.default_rng(7), np.random.default_rng(7)
    assert pool_of(TEN, 5).draw(50, rng).tolist() == expected.integers(10, size=50).tolist()
    assert rng.bit_generator.state == expected.bit_generator.state


def test_a_balanced_draw_takes_n_quantiles_and_then_n_places_from_the_generator():
    # Quantile sizes 2, 2, 2, 2, 2: quantile q has the samples 2q and 2q + 1.
    rng, expected = np.random.default_rng(7), np.random.default_rng(7)
    draws = pool_of(TEN, 5).draw(50, rng, balanced=True)
    quantiles = expected.integers(5, size=50)
    places = (expected.random(50) * 2).astype(int)
    assert draws.tolist() == (2 * quantiles + places).tolist()
    assert rng.bit_generator.state == expected.bit_generator.state


# Files


def two_iterations() -> DataPool:
    pool = DataPool(2, ("kind", "brief"))
    pool.add([[1, 2], []], [[3], [4, 5, 2**31 - 1]], [[0.1, -1e300], [1 / 3, 5e-324]], iteration=0)
    pool.add([[6]], [[]], [[0.7, 0.0]], iteration=3)
    pool.quantize()
    return pool


def test_a_pool_is_loaded_as_it_was_saved(tmp_path):
    pool = two_iterations()
    pool.save(tmp_path / "pool")
    loaded = DataPool.load(tmp_path / "pool", 2, ("kind", "brief"))
    loaded.quantize()
    assert_equal_samples(loaded, pool)
    assert np.array_equal(loaded.quantiles, pool.quantiles) and np.array_equal(loaded.edges, pool.edges)


@settings(max_examples=25, deadline=None)
@given(batches=st.lists(samples.filter(len), min_size=1, max_size=3))
def test_any_pool_is_loaded_as_it_was_saved(tmp_path_factory, batches):
    directory = tmp_path_factory.mktemp("pool")
    pool = DataPool(2)
    pool.add([[1], [2]], [[3], [4]], [0.0, 1.0], iteration=0)
    for iteration, batch in enumerate(batches, 1):
        pool.add(*([row[i] for row in batch] for i in range(3)), iteration=iteration)
    pool.save(directory)
    loaded = DataPool.load(directory, 2, ("reward",))
    pool.quantize()
    loaded.quantize()
    assert_equal_samples(loaded, pool)


def test_a_pool_file_is_plain_parquet(tmp_path):
    two_iterations().save(tmp_path)
    assert pq.read_table(tmp_path / "iteration-000000.parquet").to_pydict() == {
        "prompt_ids": [[1, 2], []],
        "completion_ids": [[3], [4, 5, 2**31 - 1]],
        "kind": [0.1, 1 / 3],
        "brief": [-1e300, 5e-324],
    }


def test_the_terms_of_a_reward_are_saved_with_the_samples(tmp_path):
    pool = DataPool(2)
    pool.add([[1], [2]], [[3], [4]], [0.5, 0.7], iteration=0, terms={"kind": [0.1, 0.3], "brief": np.array([4, 1 / 3])})
    pool.add(
        [[5]], [[6]], [0.2], iteration=1, terms={"kind": [0.6], "new": [1]}
    )  # As after resuming with other rewards.
    pool.add([[7]], [[8]], [0.1], iteration=2)
    nan = float("nan")
    expected = {"kind": [0.1, 0.3, 0.6, nan], "brief": [4, 1 / 3, nan, nan], "new": [nan, nan, 1, nan]}
    pool.save(tmp_path)
    for terms in (pool.terms, DataPool.load(tmp_path, 2, ("reward",)).terms):
        assert list(terms) == ["kind", "brief", "new"]
        for name, values in expected.items():
            np.testing.assert_array_equal(terms[name], values)
    table = pq.read_table(tmp_path / "iteration-000000.parquet")
    assert table.column_names == ["prompt_ids", "completion_ids", "reward", "score.kind", "score.brief", "score.new"]
    assert table["score.brief"].to_pylist() == [4, 1 / 3]
    with pytest.raises(ValueError, match=r"terms 'kind' \(2,\): must have shape \(1,\)"):
        pool.add([[1]], [[2]], [0.5], iteration=3, terms={"kind": [0.1, 0.2]})
    assert len(pool) == 4 == len(pool.terms["kind"])


def test_a_sample_with_one_reward_takes_at_most_32_bytes_beside_its_tokens():
    # 8 + 8 for the ends of prompt and completion, 8 for the reward, 4 for the iteration, 2 for the quantile.
    count = 2**17
    empty, rewards = [[]] * count, np.arange(count)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        pool = DataPool(2)
        pool.add(empty, empty, rewards, iteration=0)
        pool.quantize()
        assert 30 <= (tracemalloc.get_traced_memory()[0] - before) / len(pool) <= 32
    finally:
        tracemalloc.stop()


def test_an_attribute_may_be_omitted_when_loading(tmp_path):
    two_iterations().save(tmp_path)
    assert DataPool.load(tmp_path, 2, ("brief",)).rewards.tolist() == [[-1e300], [5e-324], [0.0]]


def test_only_iterations_before_the_limit_are_loaded(tmp_path):
    two_iterations().save(tmp_path)
    loaded = [DataPool.load(tmp_path, 2, ("kind",), before=before) for before in (0, 1, 3, 4)]
    assert [len(pool) for pool in loaded] == [0, 2, 2, 3]


def test_saving_writes_only_new_iterations_and_removes_partial_files(tmp_path):
    pool = pool_of([1, 2, 3], 2)
    pool.save(tmp_path)
    first = tmp_path / "iteration-000000.parquet"
    written = first.stat().st_mtime_ns, first.read_bytes()
    pool.add([[1]], [[2]], [4], iteration=1)
    (tmp_path / "iteration-000001.parquet.tmp").write_bytes(b"left by a crash")
    pool.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iteration-000000.parquet", "iteration-000001.parquet"]
    assert (first.stat().st_mtime_ns, first.read_bytes()) == written
    assert len(DataPool.load(tmp_path, 2, ("reward",))) == 4


def test_a_partial_file_is_not_read(tmp_path):
    pool_of([1, 2, 3], 2).save(tmp_path)
    (tmp_path / "iteration-000001.parquet.tmp").write_bytes(b"half")
    assert len(DataPool.load(tmp_path, 2, ("reward",))) == 3


def test_a_loaded_pool_accepts_further_samples(tmp_path):
    pool_of([1, 2, 3], 2).save(tmp_path)
    pool = DataPool.load(tmp_path, 2, ("reward",))
    pool.add([[7]], [[8]], [4], iteration=1)
    pool.quantize()
    assert pool.quantiles[:, 0].tolist() == [0, 0, 1, 1]
    assert pool[3].prompt_ids.tolist() == [7]


def test_a_saved_iteration_is_restored_with_its_metadata(tmp_path):
    saved = two_iterations()
    saved.save(tmp_path, {3: {"reward": 0.25}})
    pool = DataPool(2, ("kind", "brief"))
    assert pool.restore_iteration(tmp_path, 1) is None and len(pool) == 0  # Not on disk.
    assert pool.restore_iteration(tmp_path, 0) == {}
    assert pool.restore_iteration(tmp_path, 3) == {"reward": 0.25}
    pool.quantize()
    assert_equal_samples(pool, saved)


def table(**changed) -> pa.Table:
    columns = {"prompt_ids": [[1]], "completion_ids": [[2]], "reward": [0.5], **changed}
    return pa.table({name: column for name, column in columns.items() if column is not None})


INVALID = {
    "not Parquet": b"PAR1 this is no Parquet file PAR1",
    "empty": b"",
    "no reward": table(reward=None),
    "no prompts": table(prompt_ids=None),
    "text as a token id": table(prompt_ids=[["a"]]),
    "a text as a list": table(prompt_ids=["abc"]),
    "a number as a list": table(prompt_ids=[3]),
    "no list": table(completion_ids=pa.array([None], pa.list_(pa.int32()))),
    "no token id": table(completion_ids=pa.array([[None]], pa.list_(pa.int32()))),
    "a token id above 32 bits": table(prompt_ids=[[2**40]]),
    "a missing reward": table(reward=pa.array([None], pa.float64())),
    "a text as a reward": table(reward=["good"]),
    "a reward of NaN": table(reward=[float("nan")]),
    "a text as a term": table(**{"score.x": ["good"]}),
}


def load_error(directory: Path) -> str:
    """Return the message of the error that loading a pool raises; it is one line."""
    with pytest.raises(UserError) as error:
        DataPool.load(directory, 2, ("reward",))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_an_error_names_the_file_that_is_not_a_pool_file(tmp_path, content):
    path = tmp_path / "iteration-000000.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_table(path, content, {})  # With a valid checksum.
    assert load_error(tmp_path).startswith(f"{path}: must be an undamaged pool file with reward (")


def test_an_error_names_the_file_that_has_no_checksum(tmp_path):
    pq.write_table(table(), tmp_path / "iteration-000000.parquet")
    assert "iteration-000000.parquet" in load_error(tmp_path)


def test_an_error_names_the_file_whose_name_has_no_number(tmp_path):
    pq.write_table(table(), tmp_path / "iteration-best.parquet")
    assert "iteration-best.parquet" in load_error(tmp_path)


def test_an_error_names_the_damaged_file_wherever_the_damage_is(tmp_path):
    pool = pool_of(np.random.default_rng(0).random(50), 2)
    pool.save(tmp_path)
    path = tmp_path / "iteration-000000.parquet"
    content = path.read_bytes()
    for size in np.linspace(0, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:size])
        assert path.name in load_error(tmp_path)
    refused = 0
    for place in np.linspace(4, len(content) - 1, 300).astype(int):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            loaded = DataPool.load(tmp_path, 2, ("reward",))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:  # The byte belongs to the layout of the file, not to its values.
            assert loaded.rewards.tolist() == pool.rewards.tolist()
    assert refused > 100
