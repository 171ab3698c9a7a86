"""`Explorer`: samples completions for prompts and scores them, alone or together with other processes."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase, TrainerState

from quarkrl.data.chats import prompt_text
from quarkrl.data.encoding import decode_completions
from quarkrl.data.prompts import Prompts
from quarkrl.rewards.scorer import Scorer, Scores
from quarkrl.runs.collectives import broadcast
from quarkrl.sampling.engine import Complete
from quarkrl.sampling.strategy import Sampling
from quarkrl.training.overlap import SharedBatches, Workers, sample_and_score
from quarkrl.training.progress import Progress
from quarkrl.training.rollout import FinishedBatches, Rollout, remaining_batches, too_many_missing

# A context in which a function completes plain prompts.
Sampler: TypeAlias = Callable[[], AbstractContextManager[Complete]]


@dataclass(frozen=True)
class Task:
    """What one rollout samples.

    Attributes:
        prompts: all prompts, with their token ids.
        rows: the row of the prompt of each completion.
        sampling: how to choose tokens.
        sampler: a context in which a function completes plain prompts: the reference, or the policy at its best.
        seed: of the random numbers. Each completion has its own, so that it does not depend on the batches.
        batch_size: completions sampled at a time.
    """

    prompts: Prompts
    rows: list[int]
    sampling: Sampling
    sampler: Sampler
    seed: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True)
class CompletionScorer:
    """Scores completions given as token ids.

    Attributes:
        scorer: the rewards.
        tokenizer: decodes completions for the rewards.
        end_ids: EOS ids.
        trainer_state: returns the trainer's state, which rewards receive.
        keep_special_tokens: keep special tokens in the texts, except an EOS at the end.
    """

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    end_ids: Sequence[int]
    trainer_state: Callable[[], TrainerState] = TrainerState
    keep_special_tokens: bool = False

    def decode(self, prompts: Prompts, rows: Sequence[int], completions: list[list[int]]) -> list[str]:
        """Return the texts of completions of the prompts in the given rows, as the rewards read them."""
        ends = self.end_ids if self.keep_special_tokens else None
        prompt_ids = [prompts.ids[row] for row in rows]
        return decode_completions(self.tokenizer, prompt_ids, completions, keep_special_tokens_before=ends)

    def score(self, prompts: Prompts, rows: Sequence[int], completions: list[list[int]]) -> Scores:
        """Score completions of the prompts in the given rows. Rewards also get the prompts' other columns."""
        columns = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
        texts, state = self.decode(prompts, rows, completions), self.trainer_state()
        return self.scorer([prompts.prompts[row] for row in rows], texts, completions, columns, self.end_ids, state)


@dataclass(frozen=True)
class Processes:
    """The processes of a run: the index of this one, their number, and whether each holds a part of the weights."""

    rank: int = 0
    size: int = 1
    sharded: bool = False


class Explorer:
    """Samples and scores completions. Each process takes its share of the batches, and all get the whole rollout.

    Args:
        scorer: the rewards, with what decodes completions for them.
        progress: the progress bars.
        processes: the processes of the run.
        max_unscored_share: the share of missing rewards above which an exploration fails.
        stop_requested: whether this process has received a signal.
        stop_if_requested: ends the run if any process has received a signal; all processes call it.
    """

    def __init__(
        self,
        scorer: CompletionScorer,
        progress: Progress,
        processes: Processes,
        max_unscored_share: float,
        stop_requested: Callable[[], bool],
        stop_if_requested: Callable[[], None],
    ):
        self._scorer, self._progress, self._processes = scorer, progress, processes
        self._max_unscored_share = max_unscored_share
        self._stop_requested, self._stop_if_requested = stop_requested, stop_if_requested

    def roll_out(self, task: Task, finished: FinishedBatches | None = None) -> Rollout:
        """Sample and score a completion for each row of a task.

        Args:
            task: what to sample.
            finished: keeps each scored batch on disk. Batches that are already there are not sampled again.

        Raises:
            Stopped: a signal requested it. The batches that had begun are finished and kept.
            UserError: a reward failed.
        """
        parts, batches = self._resume(task, finished)
        keep = finished.keep if finished and self._is_first else None
        uniforms = task.sampling.uniforms(len(task.rows), *task.seed)
        with task.sampler() as complete:
            workers = Workers(
                rows=task.rows,
                sample=partial(self._sample, task, complete, uniforms),
                score=partial(self._score_batch, task),
                stop_scoring=self._scorer.scorer.stop,
                stop_requested=self._stop_requested,
            )
            if self._processes.size == 1:
                parts += sample_and_score(workers, batches, keep)
            else:
                parts, batches = broadcast((parts, batches), self._processes.size)
                rank, size, sharded = self._processes.rank, self._processes.size, self._processes.sharded
                parts += SharedBatches(workers, batches, rank, size, keep, samples_together=sharded).run()
        self._stop_if_requested()
        return Rollout.join(parts)

    def sample(self, task: Task) -> list[list[int]]:
        """Sample a completion for each row of a task, without scoring. Each process samples all of them.

        Raises:
            Stopped: a signal requested it.
        """
        uniforms = task.sampling.uniforms(len(task.rows), *task.seed)
        completions: list[list[int]] = []
        with task.sampler() as complete:
            for start in range(0, len(task.rows), task.batch_size):
                self._stop_if_requested()
                completions += self._sample(task, complete, uniforms, slice(start, start + task.batch_size))
        return completions

    def texts_of(self, prompts: Prompts, rollout: Rollout, indices: np.ndarray) -> dict[str, list[str | None]]:
        """Return the columns of texts that a pool file has, for the samples at these indices of a rollout.

        They are `prompt`, `completion`, and `extra.NAME` for each column that rewards have logged.
        """
        rows = [rollout.rows[i] for i in indices]
        return {
            "prompt": [prompt_text(prompts.prompts[row]) for row in rows],
            "completion": list(self._scorer.decode(prompts, rows, [rollout.completions[i] for i in indices])),
            **{f"extra.{name}": [texts[i] for i in indices] for name, texts in rollout.extra.items()},
        }

    @property
    def _is_first(self) -> bool:
        return self._processes.rank == 0

    def _resume(self, task: Task, finished: FinishedBatches | None) -> tuple[list[Rollout], list[slice]]:
        """Return the batches that an interrupted rollout finished, and the slices of those that remain."""
        parts = finished.load(task.rows) if finished and self._is_first else []
        batches = remaining_batches(len(task.rows), task.batch_size, parts)
        for part in parts:
            self._progress.advance_sampling(len(part.rows))
            self._progress.advance_scoring(part.rewards)
        if finished and not batches:
            unscored = sum(int((~part.has_rewards).sum()) for part in parts)
            if too_many_missing(unscored, len(task.rows), self._max_unscored_share):
                parts = [self._retry_missing_rewards(task, part, finished) for part in parts]
        return parts, batches

    def _retry_missing_rewards(self, task: Task, part: Rollout, finished: FinishedBatches) -> Rollout:
        """Retry the missing rewards of a finished batch, and keep the batch."""
        indices = np.flatnonzero(~part.has_rewards)
        if not len(indices):
            return part
        rows, completions = [part.rows[i] for i in indices], [part.completions[i] for i in indices]
        scores = self._scorer.score(task.prompts, rows, completions)  # The bar counts them already.
        rewards, terms = part.rewards.copy(), {name: values.copy() for name, values in part.terms.items()}
        rewards[indices] = scores.rewards
        for name, values in terms.items():
            values[indices] = scores.terms[name]
        extra = {name: list(texts) for name, texts in part.extra.items()}
        for name, texts in scores.extra.items():
            column = extra.setdefault(name, [None] * len(part.rows))
            for index, text in zip(indices, texts, strict=True):
                column[index] = text
        logged = {n: [*part.logged.get(n, []), *scores.metrics.get(n, [])] for n in {**part.logged, **scores.metrics}}
        part = replace(part, rewards=rewards, terms=terms, extra=extra, logged=logged)
        finished.keep(part)
        return part

    def _sample(self, task: Task, complete: Complete, uniforms: np.ndarray | None, batch: slice) -> list[list[int]]:
        prompt_ids = [task.prompts.ids[row] for row in task.rows[batch]]
        completions = complete(prompt_ids, task.sampling, None if uniforms is None else uniforms[batch])
        self._progress.advance_sampling(len(completions))
        return completions

    def _score_batch(self, task: Task, batch: slice, completions: list[list[int]]) -> Scores:
        return self._score(task, task.rows[batch], completions)

    def _score(self, task: Task, rows: Sequence[int], completions: list[list[int]]) -> Scores:
        scores = self._scorer.score(task.prompts, rows, completions)
        self._progress.advance_scoring(scores.rewards)
        return scores
