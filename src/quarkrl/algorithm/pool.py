"""The data pool: every sample ever drawn, as flat arrays of token ids with offsets, and their quantiles.

A sample is a prompt, a completion and one reward per attribute; where that is a sum, its terms may be kept too. The
pool only grows; `quantize` cuts all of it anew, so an old sample's quantile can drop as better ones arrive. Quantile 0
is the worst, K - 1 the best (the official code counts the other way).
Beside its tokens a sample of one reward takes 30 bytes; benchmarks/pool.py measures the rest.
"""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quarkrl.errors import UserError
from quarkrl.storage.parquet import read_table, write_table

logger = logging.getLogger(__name__)

# A term's column in a pool file is this and its name; no attribute's name has a dot.
_TERM = "score."
# The columns of token ids.
_TOKENS = "prompt_ids", "completion_ids"

# Rows, or tokens, at a time: what is made of the whole pool in passing is made of so many, and stays small beside it.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One row of the pool: token ids, and its quantile under each attribute."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    quantiles: np.ndarray


class DataPool:
    """Samples with rewards, cut into `num_quantiles` by each of `attributes`.

    Args:
        num_quantiles: K, at least 2.
        attributes: the names of the rewards a sample carries; A of them.
    """

    def __init__(self, num_quantiles: int, attributes: Sequence[str] = ("reward",)):
        if num_quantiles < 2:
            raise UserError(f"num_quantiles {num_quantiles}: want at least 2, for there to be a best and a worst")
        self.num_quantiles = num_quantiles
        self.attributes = tuple(attributes)
        self._tokens = _Blocks(), _Blocks()  # of the prompts and of the completions, sample after sample
        self._ends = _Growing(np.int64, width=2)  # where each sample's prompt and completion end in _tokens
        self._rewards = _Growing(np.float64, width=len(self.attributes))
        self._iterations = _Growing(np.int32)
        self._terms: dict[str, _Growing] = {}
        self._quantiles = _Growing(np.int16, width=len(self.attributes))
        self.edges = np.full((len(self.attributes), num_quantiles - 1), np.nan)

    def __len__(self) -> int:
        return len(self._iterations)

    @property
    def rewards(self) -> np.ndarray:
        """`(N, A)`: the reward of each sample under each attribute."""
        return self._rewards.view

    @property
    def terms(self) -> dict[str, np.ndarray]:
        """By name, `(N,)`: each reward function's own scores, where several are summed; NaN where none was given."""
        return {name: values.view for name, values in self._terms.items()}

    @property
    def iterations(self) -> np.ndarray:
        """`(N,)`: the iteration that drew each sample."""
        return self._iterations.view

    @property
    def lengths(self) -> np.ndarray:
        """`(N,)`: how many tokens each sample has, prompt and completion; made anew each time, see `lengths_of`."""
        return np.diff(self._ends.view.sum(1), prepend=0)

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """`(n,)`: how many tokens each of n samples has, whatever the size of the pool."""
        ends = self._ends.view
        return ends[indices].sum(1) - np.where(indices > 0, ends[indices - 1].sum(1), 0)

    @property
    def quantiles(self) -> np.ndarray:
        """`(N, A)`: the quantile of each sample, as of the last `quantize`; -1 for samples added since."""
        return self._quantiles.view

    def add(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        rewards: Sequence[float] | np.ndarray,
        *,
        iteration: int,
        terms: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    ) -> None:
        """Append n samples.

        Args:
            prompt_ids: n sequences of token ids, without any reward token.
            completion_ids: n sequences of token ids, as sampled (EOS included where it was sampled).
            rewards: `(n,)` or `(n, A)`; finite, higher is better.
            iteration: which exploration drew them.
            terms: by name, what the rewards are summed of, n numbers each.

        Raises:
            ValueError: the lengths differ, or a reward is not finite.
        """
        if len(completion_ids) != len(prompt_ids):
            raise ValueError(f"{len(prompt_ids)} prompts and {len(completion_ids)} completions: want as many")
        self._append((_flat(prompt_ids), _flat(completion_ids)), rewards, iteration, terms or {})

    def _append(
        self,
        columns: Sequence[tuple[np.ndarray, np.ndarray]],
        rewards: Sequence[float] | np.ndarray,
        iteration: int,
        terms: Mapping[str, Sequence[float] | np.ndarray],
    ) -> None:
        """`add`, of prompts and completions as `_flat` gives them."""
        count = len(columns[0][0])
        scores = np.asarray(rewards, dtype=np.float64)
        shape = (count, len(self.attributes))
        if scores.shape != shape and not (scores.shape == shape[:1] and shape[1] == 1):
            raise ValueError(f"rewards {scores.shape}: want {shape}, a row for each prompt and a column per attribute")
        scores = scores.reshape(shape)
        if not np.isfinite(scores).all():
            raise ValueError("a reward is not finite: leave such samples out before adding to the pool")
        own = {name: np.asarray(values, dtype=np.float64) for name, values in terms.items()}
        if wrong := [name for name, values in own.items() if values.shape != shape[:1]]:
            raise ValueError(f"terms {wrong[0]!r} {own[wrong[0]].shape}: want {shape[:1]}, one for each prompt")
        # What cannot be added has raised by now, before anything is.
        self._ends.extend(
            np.column_stack([np.cumsum(n) + len(kept) for (n, _), kept in zip(columns, self._tokens, strict=True)])
        )
        for (_, tokens), kept in zip(columns, self._tokens, strict=True):
            kept.extend(tokens)
        self._rewards.extend(scores)
        self._quantiles.extend(np.full(shape, -1, dtype=np.int16))
        for name in [name for name in own if name not in self._terms]:
            self._terms[name] = _Growing(np.float64)
            self._terms[name].extend(np.full(len(self), np.nan))
        for name, column in self._terms.items():
            column.extend(own.get(name, np.full(count, np.nan)))
        self._iterations.extend(np.full(count, iteration, dtype=np.int32))

    def quantize(self, ceiling: float | None = None) -> None:
        """Cut the whole pool into K quantiles by each attribute.

        Without ties the sizes differ by at most one. Equal rewards share a quantile: that of the highest-ranked
        among them, so the best quantile is never empty. A sample's quantile is the number of `edges` its reward
        reaches; `edges` is `(A, K - 1)`, and edge k is the reward of rank ceil(k N / K), counted from 0.

        Args:
            ceiling: a reward that is good enough. Where more than 1 / K of the pool reaches it, all of those are the
                best quantile, and the K - 1 others cut the rest evenly.

        Raises:
            UserError: fewer samples than quantiles.
        """
        if len(self) < self.num_quantiles:
            raise UserError(
                f"{len(self)} scored samples for {self.num_quantiles} quantiles: want at least one each; "
                "sample more per iteration or lower --num_quantiles"
            )
        for a, rewards in enumerate(self.rewards.T):
            self.edges[a] = _edges(rewards, self.num_quantiles)
            if ceiling is not None and ceiling < self.edges[a, -1]:
                below = rewards[rewards < ceiling]
                self.edges[a, -1] = ceiling
                self.edges[a, :-1] = _edges(below, self.num_quantiles - 1) if len(below) else ceiling
            sizes = np.zeros(self.num_quantiles, dtype=np.int64)
            for start in range(0, len(self), _BLOCK):
                rows = slice(start, start + _BLOCK)
                self.quantiles[rows, a] = np.searchsorted(self.edges[a], rewards[rows], side="right")
                sizes += np.bincount(self.quantiles[rows, a], minlength=self.num_quantiles)
            empty = np.flatnonzero(sizes == 0).tolist()
            if empty and rewards.min() < rewards.max():  # Of a single reward health.py has more to say.
                logger.warning(
                    f"{self.attributes[a]}: many rewards are equal, so no sample is in quantile "
                    f"{', '.join(map(str, empty))}: what their tokens ask for is not learned; "
                    "give a finer reward, or fewer quantiles"
                )

    def draw(self, n: int, rng: np.random.Generator, *, balanced: bool = False) -> np.ndarray:
        """Indices of n samples, with replacement; each in the same time however large the pool.

        A balanced draw looks at the whole pool once, before the first of the n.

        Args:
            n: how many.
            rng: where chance comes from.
            balanced: draw a combination of quantiles first, uniformly over those that occur, then a sample in it
                (the paper's words; over-samples rare quantiles where rewards tie). Default: uniform over samples,
                which is the same where the quantiles are of equal size.

        Returns:
            `(n,)` indices.
        """
        if not balanced:
            return rng.integers(len(self), size=n)
        assert self.quantiles.min() >= 0, "quantize before a balanced draw"
        groups = np.zeros(len(self), dtype=np.int16)
        for quantiles in self.quantiles.T:  # Combinations that occur, numbered in the order of their quantiles.
            groups = _renumbered(groups.astype(np.int64) * self.num_quantiles + quantiles)
        order = np.argsort(groups, kind="stable")  # Of 16 bits: a radix sort.
        sizes = np.bincount(groups)
        starts = np.cumsum(sizes) - sizes
        group = rng.integers(len(sizes), size=n)
        return order[starts[group] + (rng.random(n) * sizes[group]).astype(np.int64)]

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        assert self.quantiles[index, 0] >= 0, "quantize before reading samples"
        starts = self._ends.view[index - 1] if index else (0, 0)
        prompt_ids, completion_ids = map(_Blocks.slice, self._tokens, starts, self._ends.view[index])
        return Sample(prompt_ids, completion_ids, self.quantiles[index])

    def save(self, directory: str | os.PathLike, notes: Mapping[int, dict[str, Any]] | None = None) -> None:
        """Write each iteration not yet on disk to `directory/iteration-NNNNNN.parquet`.

        A file appears whole or not at all. Columns: `prompt_ids`, `completion_ids`, one per attribute, and
        `score.NAME` for each term.

        Args:
            directory: a run's `pool/`.
            notes: by iteration, what `recall` is to give back (JSON).

        Raises:
            UserError: the disk does not take it.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for iteration in np.unique(self.iterations).tolist():
            target = _path(directory, iteration)
            if not target.exists():
                table = self._table(np.flatnonzero(self.iterations == iteration))
                write_table(target, table, (notes or {}).get(iteration, {}))

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        num_quantiles: int,
        attributes: Sequence[str],
        before: int | None = None,
    ) -> "DataPool":
        """Read what `save` wrote; the quantiles are cut anew by the next `quantize`.

        Args:
            directory: a run's `pool/`.
            num_quantiles: K, as in the constructor.
            attributes: the rewards' names, as in the constructor.
            before: leave out this iteration and later ones.

        Raises:
            UserError: a file is damaged, or lacks one of the attributes.
        """
        pool = cls(num_quantiles, attributes)
        for path in sorted(Path(directory).glob("iteration-*.parquet")):
            name = path.stem.rpartition("-")[2]
            if not name.isdecimal():
                raise UserError(f"{path}: not a pool file with a number in its name; move it away")
            if before is None or int(name) < before:
                pool._read(path, int(name))
        return pool

    def recall(self, directory: str | os.PathLike, iteration: int) -> dict[str, Any] | None:
        """Add the samples of an iteration that `save` wrote; gives its notes, or None where there is no such file.

        Raises:
            UserError: the file is damaged, or lacks one of the attributes.
        """
        path = _path(Path(directory), iteration)
        return self._read(path, iteration) if path.exists() else None

    def _read(self, path: Path, iteration: int) -> dict[str, Any]:
        try:
            table, notes = read_table(path)
            self._extend(table, iteration)
        # pyarrow tells of damage by its own exceptions or OSError; what it reads of a foreign file fails in `add`.
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
            detail = str(error).splitlines()[0]
            wanted = f"not a pool file with {', '.join(self.attributes)}, or a damaged one"
            raise UserError(f"{path}: {wanted} ({detail})") from error
        return notes

    def _table(self, rows: np.ndarray) -> pa.Table:
        """The given rows, which follow one another, as an Arrow table."""
        first, last = rows[0], rows[-1] + 1
        ends = self._ends.view[first:last]
        starts = self._ends.view[first - 1] if first else np.zeros(2, dtype=np.int64)
        columns: dict[str, Any] = {}
        for i, name in enumerate(_TOKENS):
            offsets = np.concatenate(([0], ends[:, i] - starts[i]))
            tokens = self._tokens[i].slice(starts[i], ends[-1, i])
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
        rewards = {name: self.rewards[first:last, a] for a, name in enumerate(self.attributes)}
        terms = {_TERM + name: values[first:last] for name, values in self.terms.items()}
        return pa.table({**columns, **rewards, **terms})

    def _extend(self, table: pa.Table, iteration: int) -> None:
        tokens = [_of_lists(table[name].combine_chunks()) for name in _TOKENS]
        rewards = np.column_stack([table[name].to_numpy() for name in self.attributes])
        names = [name for name in table.column_names if name.startswith(_TERM)]
        terms = {name.removeprefix(_TERM): table[name].to_numpy() for name in names}
        self._append(tokens, rewards, iteration, terms)


def _path(directory: Path, iteration: int) -> Path:
    return directory / f"iteration-{iteration:06d}.parquet"


def _edges(rewards: np.ndarray, parts: int) -> np.ndarray:
    """The lowest rewards of all but the worst of `parts` equal parts: those of rank ceil(k N / parts)."""
    ranks = -(-np.arange(1, parts) * len(rewards) // parts)
    ranks = np.minimum(ranks, len(rewards) - 1)  # Only where there are fewer rewards than parts.
    return np.partition(rewards, ranks)[ranks] if len(ranks) else ranks.astype(float)


def _renumbered(groups: np.ndarray) -> np.ndarray:
    """Numbers 0, 1, … in place of those that occur, in their order; of 16 bits where that is enough."""
    occurs = np.bincount(groups) > 0
    return (np.cumsum(occurs) - 1).astype(np.int16 if occurs.sum() < 2**15 else np.int64)[groups]


def _flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The length of each row, and all their token ids one after another."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return lengths, np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=lengths.sum())


def _of_lists(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """`_flat` of a column of lists of integers, without making Python objects of them."""
    if not (pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type)):
        raise ValueError(f"token ids of type {column.type}")
    ids = column.flatten()
    if column.null_count or ids.null_count:
        raise ValueError("token ids are missing")
    return column.value_lengths().to_numpy().astype(np.int64), ids.cast(pa.int32()).to_numpy()


class _Blocks:
    """Token ids one can append to, in blocks of one size: those that are there are never moved to make room."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, values: np.ndarray) -> None:
        while len(values):
            block, place = divmod(self._length, _BLOCK)
            if block == len(self._blocks):
                self._blocks.append(np.empty(_BLOCK, dtype=np.int32))
            here = values[: _BLOCK - place]
            self._blocks[block][place : place + len(here)] = here
            self._length += len(here)
            values = values[len(here) :]

    def slice(self, start: int, end: int) -> np.ndarray:
        """Those from `start` to before `end`: a view where they are in one block."""
        blocks = range(start // _BLOCK, -(-end // _BLOCK))
        pieces = [self._blocks[i][max(start - i * _BLOCK, 0) : end - i * _BLOCK] for i in blocks]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int32), *pieces])


class _Growing:
    """A numpy array one can append to; room doubles when it runs out."""

    def __init__(self, dtype: type, width: int | None = None):
        self._data: np.ndarray = np.empty((1024,) if width is None else (1024, width), dtype=dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> np.ndarray:
        return self._data[: self._length]

    def extend(self, values: np.ndarray) -> None:
        needed = self._length + len(values)
        if needed > len(self._data):
            grown = np.empty((max(needed, 2 * len(self._data)), *self._data.shape[1:]), dtype=self._data.dtype)
            grown[: self._length] = self.view
            self._data = grown
        self._data[self._length : needed] = values
        self._length = needed
