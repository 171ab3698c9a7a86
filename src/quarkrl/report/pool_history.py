"""How a run's data pool grew: rewards, quantiles, lengths and diversity, iteration by iteration."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quarkrl.algorithm.pool import DataPool
from quarkrl.errors import UserError, one_line

# Completions of each iteration in which n-grams are counted: a fixed number, because shares fall as texts are added.
_DIVERSITY_SAMPLES = 500


@dataclass(frozen=True)
class PoolHistory:
    """The pool after the last iteration, and how it came about.

    Attributes:
        pool: all samples, quantized.
        numbers: the iterations that the pool has, I of them.
        edges: `(I, A, K - 1)`, the edges of the quantiles after each iteration.
        lengths: `(N,)`, the completion length of each sample, in tokens.
        distinct: n → `(I,)`, the share of distinct token n-grams among the n-grams of `diversity_samples` completions.
        diversity_samples: the number of completions of each iteration that `distinct` reads.
    """

    pool: DataPool
    numbers: list[int]
    edges: np.ndarray
    lengths: np.ndarray
    distinct: dict[int, np.ndarray]
    diversity_samples: int

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of the rewards that condition the model."""
        return self.pool.attributes

    @property
    def last_edges(self) -> np.ndarray:
        """`(A, K - 1)`, the edges after the last iteration."""
        return self.edges[-1]

    def by_iteration(self, values: np.ndarray) -> list[np.ndarray]:
        """Split values of all samples, `(N, …)`, by iteration."""
        return [values[self.pool.iterations == number] for number in self.numbers]

    def sizes(self, attribute: int) -> np.ndarray:
        """`(I, K)`: of each iteration, the number of samples that are in each quantile of the whole pool."""
        quantiles = self.by_iteration(self.pool.quantiles[:, attribute])
        return np.array([np.bincount(part, minlength=self.pool.num_quantiles) for part in quantiles])


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
    pool = DataPool(options.get("num_quantiles") or 5, _attributes(paths[0]))
    edges, completions = [], []
    with _without_warnings():
        for path in paths:
            pool.restore_iteration(directory, int(_number(path)))
            pool.quantize(options.get("reward_ceiling"))
            edges.append(pool.edges.copy())
            completions.append(pq.read_table(path, columns=["completion_ids"])["completion_ids"].combine_chunks())
    count = min(_DIVERSITY_SAMPLES, *map(len, completions))
    shares = [_distinct_shares(column, count) for column in completions]
    return PoolHistory(
        pool=pool,
        numbers=[int(_number(path)) for path in paths],
        edges=np.array(edges),
        lengths=np.concatenate([column.value_lengths().to_numpy() for column in completions]),
        distinct={n: np.array([share[n] for share in shares]) for n in (1, 2, 3)},
        diversity_samples=count,
    )


def _number(path: Path) -> str:
    return path.stem.rpartition("-")[2]


def _attributes(path: Path) -> list[str]:
    """The names of the reward columns of a pool file."""
    try:
        names = pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: must be an undamaged pool file ({one_line(error)}). Restore it.") from error
    return [name for name in names if "." not in name and name not in ("prompt_ids", "completion_ids")]


def _distinct_shares(completions: pa.ListArray, count: int) -> dict[int, float]:
    """By n, the share of distinct n-grams in `count` completions, chosen with a fixed seed."""
    chosen = np.random.default_rng(0).choice(len(completions), count, replace=False)
    rows = [completions[int(i)].as_py() for i in chosen]
    shares = {}
    for n in (1, 2, 3):
        grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        shares[n] = len(set(grams)) / len(grams) if grams else float("nan")
    return shares


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep the pool quiet about empty quantiles: the run has said so, and the report shows it."""
    logger = logging.getLogger(DataPool.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
