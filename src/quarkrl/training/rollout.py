"""`Rollout`: sampled and scored completions, and the files that keep finished batches of an unfinished exploration."""

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from quarkrl.errors import UserError
from quarkrl.storage.parquet import read_table, write_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """Sampled and scored completions.

    Attributes:
        rows: for each completion, the row of its prompt.
        completions: token ids, as sampled.
        rewards: `(n, A)`; NaN for a missing reward.
        seconds_sample, seconds_score: the time of each; both run at the same time.
        start: the index of the first completion here within the whole rollout.
        terms: by name, `(n,)`: the rewards that are summed, if a sum conditions.
        extra: by name, n texts or Nones: the columns that rewards have logged.
        logged: by name, the numbers that rewards have logged.
    """

    rows: list[int]
    completions: list[list[int]]
    rewards: np.ndarray
    seconds_sample: float
    seconds_score: float
    start: int = 0
    terms: dict[str, np.ndarray] = field(default_factory=dict)
    extra: dict[str, list[str | None]] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence["Rollout"]) -> "Rollout":
        """Return the parts as one rollout, in order."""
        parts = sorted(parts, key=lambda part: part.start)
        return cls(
            rows=[row for part in parts for row in part.rows],
            completions=[ids for part in parts for ids in part.completions],
            rewards=np.concatenate([part.rewards for part in parts]),
            seconds_sample=sum(part.seconds_sample for part in parts),
            seconds_score=sum(part.seconds_score for part in parts),
            terms={name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms},
            extra={name: _join_column(parts, name) for name in _names(part.extra for part in parts)},
            logged={
                name: [value for part in parts for value in part.logged.get(name, [])]
                for name in _names(part.logged for part in parts)
            },
        )

    @classmethod
    def of_data(cls, completions: list[list[int]], rewards: np.ndarray) -> "Rollout":
        """Return completions that came with their rewards, each of a prompt of its own."""
        return cls(list(range(len(completions))), completions, rewards, seconds_sample=0.0, seconds_score=0.0)

    @property
    def has_rewards(self) -> np.ndarray:
        """`(n,)` bool: whether a completion has every reward."""
        return np.isfinite(self.rewards).all(axis=1)

    def scored_indices(self, max_unscored_share: float, iteration: int) -> np.ndarray:
        """Return the indices of the completions that have every reward.

        Raises:
            UserError: more rewards are missing than `max_unscored_share` allows, or all are.
        """
        indices = np.flatnonzero(self.has_rewards)
        count, unscored = len(self.rows), len(self.rows) - len(indices)
        if too_many_missing(unscored, count, max_unscored_share):
            raise UserError(
                f"max_unscored_share {max_unscored_share}: {unscored} of {count} rewards in iteration {iteration + 1} "
                "are None or not finite. Fix the reward or raise the share; it must leave at least one reward."
            )
        return indices

    def metrics(self, attributes: Sequence[str], end_ids: Sequence[int]) -> dict[str, float]:
        """Return the mean and the spread of each reward, and the shape of the completions.

        Keys: each attribute and `ATTRIBUTE_std`; `score.NAME` for each summed reward; `completion_length` in tokens.
        `eos_share` is the share that ends with EOS. `unscored` is the number of completions without a reward.
        `metric.NAME` is the mean of each number that rewards have logged.
        """
        values: dict[str, float] = {}
        for name, column in zip(attributes, self.rewards[self.has_rewards].T, strict=True):
            values |= {name: float(column.mean()), f"{name}_std": float(column.std())}
        values |= {f"score.{name}": float(column[self.has_rewards].mean()) for name, column in self.terms.items()}
        values["completion_length"] = float(np.mean([len(ids) for ids in self.completions]))
        values["eos_share"] = float(np.mean([ids[-1] in end_ids for ids in self.completions]))
        values["unscored"] = int(len(self.rows) - self.has_rewards.sum())
        values |= {f"metric.{name}": float(np.mean(numbers)) for name, numbers in self.logged.items()}
        return values


def too_many_missing(unscored: int, count: int, max_unscored_share: float) -> bool:
    """Return whether an exploration of `count` completions fails, because so many of them have no reward."""
    return unscored == count or unscored > max_unscored_share * count


class FinishedBatches:
    """The scored batches of an exploration, on disk. An interrupted exploration resumes with them.

    Args:
        directory: where each batch becomes a Parquet file. The first batch creates the directory.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def keep(self, part: Rollout) -> None:
        """Write a batch atomically.

        Raises:
            UserError: the disk does not take it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {"row": pa.array(part.rows, pa.int64())}
        columns["completion_ids"] = pa.array(part.completions, pa.list_(pa.int32()))
        columns |= {f"reward.{a}": values for a, values in enumerate(part.rewards.T)}
        columns |= {f"score.{name}": values for name, values in part.terms.items()}
        columns |= {f"extra.{name}": pa.array(texts, pa.string()) for name, texts in part.extra.items()}
        notes = {name: getattr(part, name) for name in ("start", "seconds_sample", "seconds_score", "logged")}
        write_table(self.directory / f"{part.start:09d}.parquet", pa.table(columns), notes)

    def load(self, rows: list[int]) -> list[Rollout]:
        """Read the batches of the given rows. Damaged batches and those of other rows are left out."""
        parts = []
        for path in sorted(self.directory.glob("*.parquet")):
            try:
                part = _to_rollout(*read_table(path))
            except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
                logger.warning(f"{path} is damaged ({str(error).splitlines()[0]}): its batch is sampled again")
                continue
            if rows[part.start : part.start + len(part.rows)] == part.rows:
                parts.append(part)
        return parts

    def clear(self) -> None:
        """Remove all batches, once the whole iteration is on disk."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _to_rollout(table: pa.Table, notes: dict[str, Any]) -> Rollout:
    def columns(prefix: str) -> dict[str, pa.ChunkedArray]:
        return {name.removeprefix(prefix): table[name] for name in table.column_names if name.startswith(prefix)}

    rewards = [values.to_numpy().copy() for values in columns("reward.").values()]
    terms = {name: values.to_numpy().copy() for name, values in columns("score.").items()}
    extra = {name: texts.to_pylist() for name, texts in columns("extra.").items()}
    completions = table["completion_ids"].to_pylist()
    return Rollout(table["row"].to_pylist(), completions, np.column_stack(rewards), **notes, terms=terms, extra=extra)


def _names(tables: Iterable[dict[str, Any]]) -> dict[str, None]:
    """The keys of several dicts, each once, in order."""
    return {name: None for table in tables for name in table}


def _join_column(parts: Sequence[Rollout], name: str) -> list[str | None]:
    return [text for part in parts for text in part.extra.get(name) or [None] * len(part.rows)]


def remaining_batches(total: int, size: int, finished: Sequence[Rollout]) -> list[slice]:
    """Return batches of at most `size` that cover the completions from 0 to `total` that are not finished."""
    batches, position = [], 0
    for part in [*sorted(finished, key=lambda part: part.start), None]:
        end = total if part is None else part.start
        batches += [slice(start, min(start + size, end)) for start in range(position, end, size)]
        position = end if part is None else part.start + len(part.rows)
    return batches
