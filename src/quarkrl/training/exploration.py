"""What an exploration samples: which prompts in which iteration, and the completions with their rewards."""

import itertools
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError
from quarkrl.rewards.calling import current_gpu
from quarkrl.rewards.scorer import Scorer, Scores
from quarkrl.storage.parquet import read_table, write_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """Sampled and scored completions.

    Attributes:
        rows: for each completion, the row of its prompt.
        completions: token ids, as sampled.
        rewards: `(n, A)`, NaN where there is none.
        seconds_sample, seconds_score: what each took; they go on side by side.
        start: which of the whole rollout's completions is the first here.
        terms: by name, `(n,)`: what the rewards are summed of, where they are.
    """

    rows: list[int]
    completions: list[list[int]]
    rewards: np.ndarray
    seconds_sample: float
    seconds_score: float
    start: int = 0
    terms: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence["Rollout"]) -> "Rollout":
        """The parts as one, in order."""
        parts = sorted(parts, key=lambda part: part.start)
        return cls(
            rows=[row for part in parts for row in part.rows],
            completions=[ids for part in parts for ids in part.completions],
            rewards=np.concatenate([part.rewards for part in parts]),
            seconds_sample=sum(part.seconds_sample for part in parts),
            seconds_score=sum(part.seconds_score for part in parts),
            terms={name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms},
        )

    @property
    def scored(self) -> np.ndarray:
        """Indices of the completions that have every reward."""
        return np.flatnonzero(np.isfinite(self.rewards).all(axis=1))

    def scored_enough(self, max_unscored_share: float, iteration: int) -> np.ndarray:
        """`scored`.

        Raises:
            UserError: more rewards than the share allows are missing, or all of them.
        """
        count, unscored = len(self.rows), len(self.rows) - len(self.scored)
        if unscored == count or unscored > max_unscored_share * count:
            raise UserError(
                f"{unscored} of {count} rewards of iteration {iteration} are None or not finite; want at most a share "
                f"of {max_unscored_share} (max_unscored_share) and not all: mend the reward or raise the share"
            )
        return self.scored

    def figures(self, attributes: Sequence[str], end_ids: Sequence[int]) -> dict[str, float]:
        """Mean and spread of each reward, mean of each term (`score.NAME`), mean length in tokens, share that ended
        with EOS, how many have no reward.
        """
        found: dict[str, float] = {}
        for name, values in zip(attributes, self.rewards[self.scored].T, strict=True):
            found |= {name: float(values.mean()), f"{name}_std": float(values.std())}
        found |= {f"score.{name}": float(values[self.scored].mean()) for name, values in self.terms.items()}
        found["completion_length"] = float(np.mean([len(ids) for ids in self.completions]))
        found["eos_share"] = float(np.mean([ids[-1] in end_ids for ids in self.completions]))
        found["unscored"] = len(self.rows) - len(self.scored)
        return found


def score(
    scorer: Scorer,
    prompts: Prompts,
    rows: Sequence[int],
    texts: list[str],
    completions: list[list[int]],
    end_ids: Sequence[int],
) -> Scores:
    """Scores of completions (`texts` and token ids) of the prompts in the given rows, with their other columns."""
    columns = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
    return scorer([prompts.prompts[row] for row in rows], texts, completions, columns, end_ids)


def side_by_side(
    sample: Callable[[slice], list[list[int]]],
    score: Callable[[slice, list[list[int]]], Scores],
    rows: list[int],
    batches: Iterable[slice],
    stop: Callable[[], None],
    keep: Callable[[Rollout], None] | None = None,
    asked: Callable[[], bool] = lambda: False,
) -> list[Rollout]:
    """Samples batch after batch, and scores them in one other thread, in the same order.

    While a batch is scored the next is sampled, so that together they take about as long as the longer of the two.
    An error of either ends both: no further batch begins, and no thread is left when it is raised.

    Args:
        sample: completes the rows of a slice; called in this thread.
        score: scores what `sample` gave; called in the other thread, never twice at a time.
        rows: of the prompts, for the whole rollout.
        batches: which of `rows` are to be sampled at a time, and here.
        stop: makes a `score` that is running end soon.
        keep: is given each batch as soon as it is scored, in the other thread.
        asked: whether to leave it at the batches that are being sampled and scored.

    Returns:
        A rollout for each batch, in order; of the first ones only, where `asked`.
    """

    def timed(batch: slice, completions: list[list[int]], seconds: float) -> Rollout:
        began = time.perf_counter()
        scores = score(batch, completions)
        seconds_score = time.perf_counter() - began
        part = Rollout(rows[batch], completions, scores.rewards, seconds, seconds_score, batch.start, scores.terms)
        if keep is not None:
            keep(part)
        return part

    pending: list[Future[Rollout]] = []
    scoring = ThreadPoolExecutor(1, "score", initializer=torch.cuda.set_device, initargs=(current_gpu(),))
    try:
        for batch in itertools.takewhile(lambda _: not asked(), batches):
            for future in pending:
                if future.done():
                    future.result()  # Raises what scoring raised.
            began = time.perf_counter()
            completions = sample(batch)
            pending.append(scoring.submit(timed, batch, completions, time.perf_counter() - began))
        while wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION).not_done:
            if asked():
                pending = [future for future in pending if not future.cancel()]  # One that runs cannot be cancelled.
            if any(future.done() and future.exception() for future in pending):
                break
        return [future.result() for future in pending]
    finally:
        for future in pending:
            future.cancel()  # Without effect on one that runs, or has ended.
        while wait(pending, timeout=0.1).not_done:
            stop()
        scoring.shutdown()


class FinishedBatches:
    """The batches of an exploration that are sampled and scored, on disk, for it to go on from if it is interrupted.

    Args:
        directory: where they are, a Parquet file each; made with the first.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def keep(self, part: Rollout) -> None:
        """Write a batch, whole or not at all.

        Raises:
            UserError: the disk does not take it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        columns: dict[str, Any] = {"row": pa.array(part.rows, pa.int64())}
        columns["completion_ids"] = pa.array(part.completions, pa.list_(pa.int32()))
        columns |= {f"reward.{a}": values for a, values in enumerate(part.rewards.T)}
        columns |= {f"score.{name}": values for name, values in part.terms.items()}
        notes = {name: getattr(part, name) for name in ("start", "seconds_sample", "seconds_score")}
        write_table(self.directory / f"{part.start:09d}.parquet", pa.table(columns), notes)

    def load(self, rows: list[int]) -> list[Rollout]:
        """The batches of the given rows; those that are damaged, or of other rows, are left out: they are made anew."""
        found = []
        for path in sorted(self.directory.glob("*.parquet")):
            try:
                part = _part(*read_table(path))
            except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
                logger.warning(f"{path} is damaged ({str(error).splitlines()[0]}): its batch is sampled anew")
                continue
            if rows[part.start : part.start + len(part.rows)] == part.rows:
                found.append(part)
        return found

    def clear(self) -> None:
        """Remove them all: the iteration is whole on disk."""
        shutil.rmtree(self.directory, ignore_errors=True)


def _part(table: pa.Table, notes: dict[str, Any]) -> Rollout:
    named = {name: table[name].to_numpy().copy() for name in table.column_names if "." in name}
    rewards = [values for name, values in named.items() if name.startswith("reward.")]
    terms = {name.removeprefix("score."): values for name, values in named.items() if name.startswith("score.")}
    completions = table["completion_ids"].to_pylist()
    return Rollout(table["row"].to_pylist(), completions, np.column_stack(rewards), **notes, terms=terms)


def batches_left(total: int, size: int, done: Sequence[Rollout]) -> list[slice]:
    """The batches of at most `size` that make `total` completions of those that are done."""
    left, position = [], 0
    for part in [*sorted(done, key=lambda part: part.start), None]:
        end = total if part is None else part.start
        left += [slice(start, min(start + size, end)) for start in range(position, end, size)]
        position = end if part is None else part.start + len(part.rows)
    return left


def ask_again(
    done: Sequence[Rollout],
    score: Callable[[list[int], list[list[int]]], Scores],
    max_unscored_share: float,
    keep: Callable[[Rollout], None],
) -> None:
    """Ask once more for the scores that an exploration lacks, where it was refused for them and is now resumed.

    Args:
        done: its batches; those that lacked scores are changed in place.
        score: scores completions of the given rows.
        max_unscored_share: above which it was refused.
        keep: is given each batch that has changed.
    """
    missing = [np.flatnonzero(~np.isfinite(part.rewards).all(axis=1)) for part in done]
    if sum(map(len, missing)) <= max_unscored_share * sum(len(part.rows) for part in done):
        return
    for part, places in zip(done, missing, strict=True):
        if len(places):
            scores = score([part.rows[i] for i in places], [part.completions[i] for i in places])
            part.rewards[places] = scores.rewards
            for name, values in part.terms.items():
                values[places] = scores.terms[name]
            keep(part)
