"""The samples of a data pool as columns: flat numpy arrays in memory, an Arrow table on disk.

Arrays grow at the end and are never copied as a whole to make room for token ids. Beside its tokens, a sample with one
reward takes 30 bytes; benchmarks/pool.py measures the rest.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

# Columns of token ids in a pool file.
_PROMPTS, _COMPLETIONS = "prompt_ids", "completion_ids"
# Prefix of a term's column in a pool file; the name of an attribute never contains a dot.
_TERM_PREFIX = "score."
# Tokens in one block of token ids.
_BLOCK_LENGTH = 1 << 20


class TokenLists(NamedTuple):
    """n lists of token ids: their lengths, and all ids one after another."""

    lengths: np.ndarray  # (n,), int64
    ids: np.ndarray  # (sum of lengths,), int32

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> "TokenLists":
        """Convert lists of token ids."""
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        return cls(lengths, np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=lengths.sum()))

    @classmethod
    def from_arrow(cls, column: pa.Array) -> "TokenLists":
        """Convert a column of lists of integers without creating Python objects.

        Raises:
            ValueError: the column has another type, or a list or a token id is missing.
        """
        if not (pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type)):
            raise ValueError(f"token ids of type {column.type}: must be lists of integers")
        ids = column.flatten()
        if column.null_count or ids.null_count:
            raise ValueError("token ids are missing")
        return cls(column.value_lengths().to_numpy().astype(np.int64), ids.cast(pa.int32()).to_numpy())


@dataclass(frozen=True)
class NewSamples:
    """n samples that are ready to be appended.

    Attributes:
        prompts, completions: token ids.
        rewards: `(n, A)`, finite.
        terms: by name, `(n,)`, the scores of each reward function that the rewards are the sum of.
    """

    prompts: TokenLists
    completions: TokenLists
    rewards: np.ndarray
    terms: dict[str, np.ndarray]

    @classmethod
    def convert(
        cls,
        prompts: TokenLists,
        completions: TokenLists,
        rewards: Sequence[float] | np.ndarray,
        terms: Mapping[str, Sequence[float] | np.ndarray],
        num_attributes: int,
    ) -> "NewSamples":
        """Validate rewards and terms, and convert them to arrays.

        Args:
            rewards: `(n, A)`, or `(n,)` if A is 1.
            terms: by name, `(n,)`.
            num_attributes: A.

        Raises:
            ValueError: a shape is wrong, or a reward is not finite.
        """
        shape = (len(prompts.lengths), num_attributes)
        array = np.asarray(rewards, dtype=np.float64)
        if array.shape != shape and not (array.shape == shape[:1] and num_attributes == 1):
            raise ValueError(
                f"rewards {array.shape}: must have shape {shape}. Pass a row per prompt, a column per reward."
            )
        array = array.reshape(shape)
        if not np.isfinite(array).all():
            raise ValueError("rewards: must be finite. Leave out samples without a reward.")
        arrays = {name: np.asarray(values, dtype=np.float64) for name, values in terms.items()}
        for name, values in arrays.items():
            if values.shape != shape[:1]:
                raise ValueError(f"terms {name!r} {values.shape}: must have shape {shape[:1]}. Pass one per prompt.")
        return cls(prompts, completions, array, arrays)


class SampleColumns:
    """The samples of a pool, in columns that grow.

    Args:
        num_attributes: A, the number of rewards of a sample.
    """

    def __init__(self, num_attributes: int):
        self._tokens = _TokenBlocks(), _TokenBlocks()  # Of prompts and of completions, sample after sample.
        self._ends = _GrowingArray(np.int64, width=2)  # Where each prompt and each completion ends in _tokens.
        self._rewards = _GrowingArray(np.float64, width=num_attributes)
        self._quantiles = _GrowingArray(np.int16, width=num_attributes)
        self._iterations = _GrowingArray(np.int32)
        self._terms: dict[str, _GrowingArray] = {}

    def __len__(self) -> int:
        return len(self._iterations)

    @property
    def rewards(self) -> np.ndarray:
        """`(N, A)`, the rewards of each sample."""
        return self._rewards.view

    @property
    def quantiles(self) -> np.ndarray:
        """`(N, A)`, the quantiles of each sample; -1 until they are assigned. Writable."""
        return self._quantiles.view

    @property
    def iterations(self) -> np.ndarray:
        """`(N,)`, the iteration that sampled each sample."""
        return self._iterations.view

    @property
    def terms(self) -> dict[str, np.ndarray]:
        """By name, `(N,)`, the terms of each sample's reward; NaN where a sample has none."""
        return {name: values.view for name, values in self._terms.items()}

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of tokens of n samples, `(n,)`, in time that does not depend on N."""
        ends = self._ends.view
        return ends[indices].sum(1) - np.where(indices > 0, ends[indices - 1].sum(1), 0)

    def token_ids(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of a sample's prompt and completion; `index` is at least 0."""
        starts, ends = self._ends.view[index - 1] if index else (0, 0), self._ends.view[index]
        prompt_ids, completion_ids = map(_TokenBlocks.slice, self._tokens, starts, ends)
        return prompt_ids, completion_ids

    def append(self, samples: NewSamples, iteration: int) -> None:
        """Append samples that an iteration sampled; they have no quantile yet."""
        count, columns = len(samples.rewards), (samples.prompts, samples.completions)
        # The old length of each token column is added before the column is extended.
        ends = [np.cumsum(new.lengths) + len(tokens) for new, tokens in zip(columns, self._tokens, strict=True)]
        self._ends.extend(np.column_stack(ends))
        for new, tokens in zip(columns, self._tokens, strict=True):
            tokens.extend(new.ids)
        self._rewards.extend(samples.rewards)
        self._quantiles.extend(np.full(samples.rewards.shape, -1, dtype=np.int16))
        for name in [name for name in samples.terms if name not in self._terms]:
            self._terms[name] = _GrowingArray(np.float64)
            self._terms[name].extend(np.full(len(self), np.nan))
        for name, column in self._terms.items():
            column.extend(samples.terms.get(name, np.full(count, np.nan)))
        self._iterations.extend(np.full(count, iteration, dtype=np.int32))

    def to_table(self, rows: slice, attributes: Sequence[str]) -> pa.Table:
        """Convert consecutive samples to an Arrow table.

        Args:
            rows: start and end of the samples; at least one.
            attributes: names of the reward columns.
        """
        ends = self._ends.view[rows]
        starts = self._ends.view[rows.start - 1] if rows.start else np.zeros(2, dtype=np.int64)
        columns: dict[str, pa.Array | np.ndarray] = {}
        for i, name in enumerate((_PROMPTS, _COMPLETIONS)):
            offsets = np.concatenate(([0], ends[:, i] - starts[i]))
            tokens = self._tokens[i].slice(starts[i], ends[-1, i])
            columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(tokens))
        rewards = {name: self.rewards[rows, a] for a, name in enumerate(attributes)}
        terms = {_TERM_PREFIX + name: values[rows] for name, values in self.terms.items()}
        return pa.table({**columns, **rewards, **terms})


def read_samples(table: pa.Table, attributes: Sequence[str]) -> NewSamples:
    """Convert what `SampleColumns.to_table` returned back to samples.

    Raises:
        KeyError: a column is missing.
        TypeError, ValueError: a column has another type, or a value is missing or not finite.
    """
    prompts, completions = (TokenLists.from_arrow(table[name].combine_chunks()) for name in (_PROMPTS, _COMPLETIONS))
    rewards = np.column_stack([table[name].to_numpy() for name in attributes])
    names = [name for name in table.column_names if name.startswith(_TERM_PREFIX)]
    terms = {name.removeprefix(_TERM_PREFIX): table[name].to_numpy() for name in names}
    return NewSamples.convert(prompts, completions, rewards, terms, len(attributes))


class _TokenBlocks:
    """Growing token ids in blocks of equal size, so that existing ids are never moved to make room."""

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, ids: np.ndarray) -> None:
        while len(ids):
            block, offset = divmod(self._length, _BLOCK_LENGTH)
            if block == len(self._blocks):
                self._blocks.append(np.empty(_BLOCK_LENGTH, dtype=np.int32))
            fitting = ids[: _BLOCK_LENGTH - offset]
            self._blocks[block][offset : offset + len(fitting)] = fitting
            self._length += len(fitting)
            ids = ids[len(fitting) :]

    def slice(self, start: int, end: int) -> np.ndarray:
        """Return the ids from `start` up to `end`: a view if they are in one block, else a copy."""
        blocks = range(start // _BLOCK_LENGTH, -(-end // _BLOCK_LENGTH))
        pieces = [self._blocks[i][max(start - i * _BLOCK_LENGTH, 0) : end - i * _BLOCK_LENGTH] for i in blocks]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int32), *pieces])


class _GrowingArray:
    """A numpy array that grows along its first dimension; its capacity doubles when it is full."""

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
