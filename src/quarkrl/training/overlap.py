"""Sampling and scoring at the same time, in one process or in step with others."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object

from quarkrl.errors import UserError
from quarkrl.models.device import current_gpu
from quarkrl.rewards.scorer import Scores
from quarkrl.training.rollout import Rollout


@dataclass(frozen=True)
class Workers:
    """What samples and scores a batch of a rollout, and how to end it early.

    Attributes:
        rows: the prompt rows of the whole rollout. A batch is a slice of them.
        sample: completes the prompts of a batch.
        score: scores the completions of a batch. Never called twice at a time.
        stop_scoring: makes a running `score` end soon.
        stop_requested: whether no further batch should begin.
    """

    rows: list[int]
    sample: Callable[[slice], list[list[int]]]
    score: Callable[[slice, list[list[int]]], Scores]
    stop_scoring: Callable[[], None]
    stop_requested: Callable[[], bool]


def sample_and_score(
    workers: Workers, batches: Iterable[slice], on_batch: Callable[[Rollout], None] | None = None
) -> list[Rollout]:
    """Sample batch after batch, and score them in one other thread, in the same order.

    While a batch is scored the next one is sampled, so both together take about as long as the slower of the two. An
    error of either ends both: no further batch begins, and no thread remains when the error is raised.

    Args:
        workers: what samples and scores. `sample` runs in this thread, `score` in the other.
        batches: the batches to sample here.
        on_batch: receives each batch as soon as it is scored, in the other thread.

    Returns:
        A rollout for each batch, in order; for the first batches only, if a stop was requested.
    """

    def score_batch(batch: slice, completions: list[list[int]], seconds_sample: float) -> Rollout:
        start = time.perf_counter()
        scores = workers.score(batch, completions)
        part = Rollout(
            rows=workers.rows[batch],
            completions=completions,
            rewards=scores.rewards,
            seconds_sample=seconds_sample,
            seconds_score=time.perf_counter() - start,
            start=batch.start,
            terms=scores.terms,
            extra=scores.extra,
            logged=scores.metrics,
        )
        if on_batch is not None:
            on_batch(part)
        return part

    pending: list[Future[Rollout]] = []
    scoring = ThreadPoolExecutor(1, "score", initializer=torch.cuda.set_device, initargs=(current_gpu(),))
    try:
        for batch in itertools.takewhile(lambda _: not workers.stop_requested(), batches):
            for future in pending:
                if future.done():
                    future.result()  # Raises the error of the other thread.
            start = time.perf_counter()
            completions = workers.sample(batch)
            pending.append(scoring.submit(score_batch, batch, completions, time.perf_counter() - start))
        while wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION).not_done:
            if workers.stop_requested():
                pending = [future for future in pending if not future.cancel()]  # A running one cannot be cancelled.
            if any(future.done() and future.exception() for future in pending):
                break
        return [future.result() for future in pending]
    finally:
        for future in pending:
            future.cancel()  # No effect on one that runs or has ended.
        while wait(pending, timeout=0.1).not_done:
            workers.stop_scoring()
        scoring.shutdown()


class SharedBatches:
    """The batches of a rollout, shared by all processes: each takes one, then they meet, and so on.

    When they meet, they exchange the batches scored since the last time. They stop together if one has received a
    signal, and fail together if one has failed. Iterating yields this process's batches and meets in between; it ends
    when every batch is scored.

    Args:
        workers: what samples and scores in this process.
        batches: the batches of all processes.
        rank, size: the index of this process, and the number of processes.
        keep: receives each batch that any process has scored; None in a process that does not write.
        samples_together: whether all processes must sample at the same time, since each holds a part of the weights.

    Attributes:
        parts: the batches that all processes have scored.
        stopping: whether a process has received a signal, so that no further batch begins.
    """

    def __init__(
        self,
        workers: Workers,
        batches: Sequence[slice],
        rank: int,
        size: int,
        keep: Callable[[Rollout], None] | None,
        samples_together: bool,
    ):
        self._workers, self._batches = workers, batches
        self._rank, self._size, self._keep, self._samples_together = rank, size, keep, samples_together
        self.parts: list[Rollout] = []
        self.stopping = False
        self._scored_here: deque[Rollout] = deque()
        self._begun = self._sent = 0
        self._error: BaseException | None = None  # Of this process, for the next meeting.
        self._failed_together = False

    def run(self) -> list[Rollout]:
        """Sample and score this process's batches; return those of all processes."""
        workers = replace(self._workers, score=self._score, stop_requested=lambda: self.stopping)
        try:
            sample_and_score(workers, self, on_batch=self._scored_here.append)
        except BaseException as error:
            if self._must_report(error):
                self._error = error
                self._meet()
            raise
        self._meet()  # Exchange what was still being scored when they stopped.
        return self.parts

    def _must_report(self, error: BaseException) -> bool:
        """Return whether the other processes still have to learn of an error, because they wait at the next meeting."""
        if self._failed_together:
            return False
        # Where all sample at the same time, the others wait within sampling and not at a meeting. A second Ctrl-C ends
        # this process at once.
        return error is self._error or (isinstance(error, Exception) and not self._samples_together)

    def __iter__(self) -> Iterator[slice]:
        for first in range(0, len(self._batches), self._size):
            self._meet()
            if self.stopping:
                return
            if first + self._rank < len(self._batches):
                self._begun += 1
                yield self._batches[first + self._rank]
            elif self._samples_together:
                self._workers.sample(self._batches[first])  # The result is not used.
        while self._meet() and not self.stopping:
            time.sleep(0.1)

    def _score(self, batch: slice, completions: list[list[int]]) -> Scores:
        """Score a batch. Its error ends all processes when they meet next."""
        try:
            return self._workers.score(batch, completions)
        except BaseException as error:
            self._error = error
            raise

    def _meet(self) -> bool:
        """Exchange the batches scored since the last time; return whether a process still scores.

        Raises:
            UserError: another process has failed. If this one has, its error is raised.
        """
        new = [self._scored_here.popleft() for _ in range(len(self._scored_here))]
        self._sent += len(new)
        error = self._error  # It may come while they exchange; then the next meeting reports it.
        failure = None if error is None else f"process {self._rank}: {error}"
        message = (new, self._sent < self._begun, self._workers.stop_requested(), failure)
        messages = gather_object([message])
        failures = [failure for *_, failure in messages if failure is not None]
        self._failed_together = bool(failures)
        for parts, *_ in messages:
            self.parts += parts
            for part in parts if self._keep is not None else ():
                self._keep(part)  # type: ignore[misc]
        if error is not None:
            raise error
        if failures:
            raise UserError(failures[0])
        self.stopping |= any(stop_requested for _, _, stop_requested, _ in messages)
        return any(busy for _, busy, _, _ in messages)
