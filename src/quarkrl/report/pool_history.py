"""How a run's data pool grew: rewards, quantiles, lengths and diversity, iteration by iteration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quarkrl.algorithm.pool import find_edges
from quarkrl.algorithm.pool_table import attributes_of
from quarkrl.errors import UserError, one_line

# Completions of each iteration in which n-grams are counted: a fixed number, because shares fall as texts are added.
_DIVERSITY_SAMPLES = 500


@dataclass(frozen=True)
class PoolHistory:
    """The N samples of a pool, and how it came about in I iterations.

    Attributes:
        num_quantiles: K.
        attributes: the names of the A rewards that condition the model.
        numbers: the iterations that the pool has, from 1.
        iterations: `(N,)`, the iteration of each sample.
        rewards: `(N, A)`.
        edges: `(I, A, K - 1)`, the edges of the quantiles after each iteration.
        quantiles: `(N, A)`, the quantile of each sample after the last iteration.
        lengths: `(N,)`, the completion length of each sample, in tokens.
        distinct: n → `(I,)`, the share of distinct token n-grams among the n-grams of `diversity_samples` completions.
        diversity_samples: the number of completions of each iteration that `distinct` reads.
        table: a row per sample: token ids, and the texts `prompt` and `completion` if the run has written them.
    """

    num_quantiles: int
    attributes: list[str]
    numbers: list[int]
    iterations: np.ndarray
    rewards: np.ndarray
    edges: np.ndarray
    quantiles: np.ndarray
    lengths: np.ndarray
    distinct: dict[int, np.ndarray]
    diversity_samples: int
    table: pa.Table

    def __len__(self) -> int:
        return len(self.rewards)

    def by_iteration(self, values: np.ndarray) -> list[np.ndarray]:
        """Split values of all samples, `(N, …)`, by iteration."""
        return [values[self.iterations == number] for number in self.numbers]

    def sizes(self, attribute: int) -> np.ndarray:
        """`(I, K)`: of each iteration, the number of samples that are in each quantile of the whole pool."""
        parts = self.by_iteration(self.quantiles[:, attribute])
        return np.array([np.bincount(part, minlength=self.num_quantiles) for part in parts])


def read_pool_history(directory: Path, options: dict[str, Any]) -> PoolHistory | None:
    """Read the `pool/` of a run; None if it has no complete iteration.

    Args:
        directory: the pool.
        options: of the run: `num_quantiles`, `reward_ceiling`.

    Raises:
        UserError: a file is damaged.
    """
    paths = sorted(path for path in directory.glob("iteration-*.parquet") if _number(path).isdecimal())
    if not paths:
        return None
    tables = [_read(path) for path in paths]
    attributes, num_quantiles = attributes_of(tables[0]), options.get("num_quantiles") or 5
    numbers, sizes = [int(_number(path)) + 1 for path in paths], [len(table) for table in tables]
    rewards = np.concatenate([np.column_stack([table[name].to_numpy() for name in attributes]) for table in tables])
    edges = np.array(
        [
            [find_edges(column, num_quantiles, options.get("reward_ceiling")) for column in rewards[:end].T]
            for end in np.cumsum(sizes)
        ]
    )
    completions = [table["completion_ids"].combine_chunks() for table in tables]
    count = min(_DIVERSITY_SAMPLES, *sizes)
    shares = [_distinct_shares(column, count) for column in completions]
    kept = [name for name in ("prompt_ids", "completion_ids", "prompt", "completion") if name in tables[0].column_names]
    return PoolHistory(
        num_quantiles=num_quantiles,
        attributes=attributes,
        numbers=numbers,
        iterations=np.repeat(numbers, sizes),
        rewards=rewards,
        edges=edges,
        quantiles=np.column_stack(
            [np.searchsorted(edges[-1, a], rewards[:, a], side="right") for a in range(len(attributes))]
        ),
        lengths=np.concatenate([column.value_lengths().to_numpy() for column in completions]),
        distinct={n: np.array([share[n] for share in shares]) for n in (1, 2, 3)},
        diversity_samples=count,
        table=pa.concat_tables([table.select(kept).replace_schema_metadata(None) for table in tables]),
    )


def _number(path: Path) -> str:
    return path.stem.rpartition("-")[2]


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: must be an undamaged pool file ({one_line(error)}). Restore it.") from error


def _distinct_shares(completions: pa.ListArray, count: int) -> dict[int, float]:
    """By n, the share of distinct n-grams in `count` completions, chosen with a fixed seed."""
    chosen = np.random.default_rng(0).choice(len(completions), count, replace=False)
    rows = [completions[int(i)].as_py() for i in chosen]
    shares = {}
    for n in (1, 2, 3):
        grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        shares[n] = len(set(grams)) / len(grams) if grams else float("nan")
    return shares
