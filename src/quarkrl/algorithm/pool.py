"""The data pool D: every sample of the run, and the quantile of each sample.

A sample is a prompt x, a completion y and one reward r(x, y) per attribute. The pool only grows. `quantize` assigns the
quantiles of all samples again, so an old sample moves to a lower quantile when better samples arrive. Quantile 0 is the
worst and K - 1 the best; the official code counts the other way.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quarkrl.algorithm.pool_columns import NewSamples, SampleColumns, TokenLists, read_samples
from quarkrl.errors import UserError, one_line
from quarkrl.storage.parquet import read_table, write_table

logger = logging.getLogger(__name__)

# Samples that are assigned to quantiles at a time, so that temporary arrays stay small beside the pool.
_ROWS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One sample of the pool: token ids, and its quantile under each attribute, `(A,)`."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    quantiles: np.ndarray


class DataPool:
    """Samples with rewards, in `num_quantiles` quantiles by each of `attributes`.

    Args:
        num_quantiles: K, at least 2.
        attributes: the names of a sample's rewards; A of them.

    Attributes:
        edges: `(A, K - 1)`, the reward from which each quantile but the worst starts; NaN before `quantize`.

    Raises:
        UserError: `num_quantiles` is below 2.
    """

    def __init__(self, num_quantiles: int, attributes: Sequence[str] = ("reward",)):
        if num_quantiles < 2:
            raise UserError(
                f"num_quantiles {num_quantiles}: must be at least 2. Set --num_quantiles 5 for the paper's setting."
            )
        self.num_quantiles = num_quantiles
        self.attributes = tuple(attributes)
        self.edges = np.full((len(self.attributes), num_quantiles - 1), np.nan)
        self._columns = SampleColumns(len(self.attributes))
        self._noted: set[tuple[str, int]] = set()  # What `_note_empty` has said.

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def rewards(self) -> np.ndarray:
        """`(N, A)`, the reward of each sample under each attribute."""
        return self._columns.rewards

    @property
    def terms(self) -> dict[str, np.ndarray]:
        """By name, `(N,)`, the scores of each reward function if several are summed; NaN where a sample has none."""
        return self._columns.terms

    @property
    def iterations(self) -> np.ndarray:
        """`(N,)`, the iteration that sampled each sample."""
        return self._columns.iterations

    @property
    def quantiles(self) -> np.ndarray:
        """`(N, A)`, the quantile of each sample as of the last `quantize`; -1 for samples that were added later."""
        return self._columns.quantiles

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of tokens of n samples, `(n,)`, in time that does not depend on the pool's size."""
        return self._columns.lengths_of(indices)

    def add(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        rewards: Sequence[float] | np.ndarray,
        *,
        iteration: int,
        terms: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    ) -> None:
        """Add n samples to the pool.

        Args:
            prompt_ids: n sequences of token ids, without reward tokens.
            completion_ids: n sequences of token ids as sampled, with EOS where it was sampled.
            rewards: `(n,)` or `(n, A)`; finite, higher is better.
            iteration: the iteration that sampled them.
            terms: by name, `(n,)`, the scores that the reward is the sum of.

        Raises:
            ValueError: the lengths differ, or a reward is not finite. The pool is then unchanged.
        """
        if len(completion_ids) != len(prompt_ids):
            raise ValueError(
                f"completion_ids of {len(completion_ids)} samples: must be as many as prompt_ids, {len(prompt_ids)}. "
                "Pass one completion per prompt."
            )
        prompts, completions = TokenLists.from_lists(prompt_ids), TokenLists.from_lists(completion_ids)
        samples = NewSamples.convert(prompts, completions, rewards, terms or {}, len(self.attributes))
        self._columns.append(samples, iteration)

    def quantize(self, ceiling: float | None = None) -> None:
        """Assign every sample of the pool to one of K quantiles by each attribute.

        Edge k is the reward of rank ceil(k N / K), counted from 0, for k from 1 to K - 1. A sample's quantile is the
        number of edges that its reward reaches. Without ties the sizes of the quantiles differ by at most one. Equal
        rewards share a quantile, that of the highest-ranked among them, so the best quantile is never empty. The lowest
        reward is always in quantile 0: an edge that equals it becomes the next higher reward.

        Args:
            ceiling: a reward that is good enough. If more than 1 / K of the pool reaches it, all of those samples form
                the best quantile. The K - 1 others divide the rest evenly.

        Raises:
            UserError: the pool has fewer samples than quantiles.
        """
        if len(self) < self.num_quantiles:
            raise UserError(
                f"num_quantiles {self.num_quantiles}: must be at most the number of scored samples, {len(self)}. "
                "Sample more per iteration or lower --num_quantiles."
            )
        for a, name in enumerate(self.attributes):
            self.edges[a] = find_edges(self.rewards[:, a], self.num_quantiles, ceiling)
            self._note_empty(name, self.rewards[:, a], self._assign_quantiles(a), ceiling)

    def _note_empty(self, name: str, rewards: np.ndarray, sizes: np.ndarray, ceiling: float | None) -> None:
        """Say, once for each number of quantiles that have samples, that ties leave the others empty."""
        count = int((sizes > 0).sum())
        # If all rewards are equal, training.health reports it.
        if count in (1, self.num_quantiles) or (name, count) in self._noted:
            return
        self._noted.add((name, count))
        values, times = np.unique(rewards if ceiling is None else np.minimum(rewards, ceiling), return_counts=True)
        most = times.argmax()
        logger.warning(
            f"{name}: {times[most] / len(rewards):.0%} of the samples share the reward {values[most]:g}, so {count} of "
            f"{self.num_quantiles} quantiles have samples: {', '.join(map(str, np.flatnonzero(sizes)))}. The run uses "
            f"those. A new run can have as many with --num_quantiles {count}, or a finer reward."
        )

    def _assign_quantiles(self, attribute: int) -> np.ndarray:
        """Set the quantiles of all samples by the edges of one attribute; return the K quantiles' sizes."""
        sizes = np.zeros(self.num_quantiles, dtype=np.int64)
        for start in range(0, len(self), _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            quantiles = np.searchsorted(self.edges[attribute], self.rewards[rows, attribute], side="right")
            self.quantiles[rows, attribute] = quantiles
            sizes += np.bincount(quantiles, minlength=self.num_quantiles)
        return sizes

    def draw(self, n: int, rng: np.random.Generator, *, balanced: bool = False) -> np.ndarray:
        """Draw n samples with replacement.

        The time per draw does not depend on the pool's size; a balanced draw reads the whole pool once before.

        Args:
            n: the number of draws.
            rng: the random generator; equal generators give equal draws.
            balanced: first draw a combination of quantiles, uniformly over those that occur, then a sample in it. This
                is the paper's wording; it over-samples rare quantiles where rewards tie. The default is uniform over
                samples, which is the same if the quantiles have equal sizes.

        Returns:
            `(n,)`, indices of samples.
        """
        if not balanced:
            return rng.integers(len(self), size=n)
        assert self.quantiles.min() >= 0, "quantize before a balanced draw"
        groups = np.zeros(len(self), dtype=np.int16)
        for quantiles in self.quantiles.T:  # Number the combinations that occur, in the order of their quantiles.
            groups = _renumber(groups.astype(np.int64) * self.num_quantiles + quantiles)
        order = np.argsort(groups, kind="stable")  # A radix sort if groups has 16 bits.
        sizes = np.bincount(groups)
        starts = np.cumsum(sizes) - sizes
        group = rng.integers(len(sizes), size=n)
        return order[starts[group] + (rng.random(n) * sizes[group]).astype(np.int64)]

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        assert self.quantiles[index, 0] >= 0, "quantize before reading samples"
        prompt_ids, completion_ids = self._columns.token_ids(index)
        return Sample(prompt_ids, completion_ids, self.quantiles[index])

    def save(
        self,
        directory: str | os.PathLike,
        metadata: Mapping[int, dict[str, Any]] | None = None,
        texts: Mapping[int, Mapping[str, Sequence[str | None]]] | None = None,
    ) -> None:
        """Write each iteration that is not yet on disk to `directory/iteration-NNNNNN.parquet`, atomically.

        The columns of a file are `prompt_ids`, `completion_ids`, one per attribute, `score.NAME` for each term, and
        those of `texts`.

        Args:
            directory: the `pool/` of a run.
            metadata: by iteration, a JSON object that `restore_iteration` returns.
            texts: by iteration and name of a column, a text for each sample. They are on disk only.

        Raises:
            UserError: a file cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for iteration in np.unique(self.iterations).tolist():
            path = _iteration_path(directory, iteration)
            if not path.exists():
                rows = np.flatnonzero(self.iterations == iteration)  # Samples of an iteration are consecutive.
                table = self._columns.to_table(slice(rows[0], rows[-1] + 1), self.attributes)
                for name, column in (texts or {}).get(iteration, {}).items():
                    table = table.append_column(name, pa.array(column, pa.string()))
                write_table(path, table, (metadata or {}).get(iteration, {}))

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        num_quantiles: int,
        attributes: Sequence[str],
        before: int | None = None,
    ) -> "DataPool":
        """Read a pool that `save` wrote; call `quantize` before using its samples.

        Args:
            directory: the `pool/` of a run.
            num_quantiles: K.
            attributes: the names of the rewards to read.
            before: read only iterations before this one.

        Raises:
            UserError: a file is damaged or lacks an attribute.
        """
        pool = cls(num_quantiles, attributes)
        for path in sorted(Path(directory).glob("iteration-*.parquet")):
            number = path.stem.rpartition("-")[2]
            if not number.isdecimal():
                raise UserError(f"{path}: must be named iteration-NUMBER.parquet. Move it out of the pool.")
            if before is None or int(number) < before:
                pool._read(path, int(number))
        return pool

    def restore_iteration(self, directory: str | os.PathLike, iteration: int) -> dict[str, Any] | None:
        """Add the samples of an iteration that `save` wrote.

        Returns:
            The iteration's metadata, or None if the iteration is not on disk.

        Raises:
            UserError: the file is damaged or lacks an attribute.
        """
        path = _iteration_path(Path(directory), iteration)
        return self._read(path, iteration) if path.exists() else None

    def _read(self, path: Path, iteration: int) -> dict[str, Any]:
        try:
            table, metadata = read_table(path)
            samples = read_samples(table, self.attributes)
        # pyarrow reports damage as its own exceptions or OSError; columns of a foreign file raise the others.
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"{path}: must be an undamaged pool file with {', '.join(self.attributes)} ({one_line(error)}). "
                "Restore it from a backup."
            ) from error
        self._columns.append(samples, iteration)
        return metadata


def _iteration_path(directory: Path, iteration: int) -> Path:
    return directory / f"iteration-{iteration:06d}.parquet"


def find_edges(rewards: np.ndarray, num_quantiles: int, ceiling: float | None) -> np.ndarray:
    """Return `(K - 1,)`, the lowest reward of each quantile but the worst; see `DataPool.quantize`."""
    edges = _split_evenly(rewards, num_quantiles)
    if ceiling is not None and ceiling < edges[-1]:
        rest = rewards[rewards < ceiling]
        lower = _split_evenly(rest, num_quantiles - 1) if len(rest) else np.full(num_quantiles - 2, ceiling)
        edges = np.append(lower, ceiling)
    lowest, highest = rewards.min(), min(rewards.max(), np.inf if ceiling is None else ceiling)
    if edges[0] == lowest < highest:
        # Otherwise the lowest reward, where it is common, would share a quantile with better ones.
        edges[edges == lowest] = min(rewards[rewards > lowest].min(), highest)
    return edges


def _split_evenly(rewards: np.ndarray, parts: int) -> np.ndarray:
    """Return the lowest reward of each of `parts` equal parts but the worst: those of rank ceil(k N / parts)."""
    ranks = -(-np.arange(1, parts) * len(rewards) // parts)
    ranks = np.minimum(ranks, len(rewards) - 1)  # Has an effect only if there are fewer rewards than parts.
    return np.partition(rewards, ranks)[ranks] if len(ranks) else ranks.astype(float)


def _renumber(groups: np.ndarray) -> np.ndarray:
    """Replace group numbers by 0, 1, … in the same order, without gaps; int16 if it is wide enough."""
    occurs = np.bincount(groups) > 0
    return (np.cumsum(occurs) - 1).astype(np.int16 if occurs.sum() < 2**15 else np.int64)[groups]
