"""Sampling and scoring at the same time: order, errors, signals, and no thread left."""

import asyncio
import os
import signal
import threading
import time

import numpy as np
import pytest

from quarkrl.errors import UserError
from quarkrl.rewards import Scorer, Scores
from quarkrl.training.overlap import SharedBatches, Workers, sample_and_score
from quarkrl.training.rollout import Rollout, remaining_batches


def beside(sample, score, batches=6, stop=lambda: None) -> list[Rollout]:
    """Batches of two completions."""
    rows = list(range(100, 100 + 2 * batches))
    workers = Workers(rows, sample, score, stop_scoring=stop, stop_requested=lambda: False)
    return sample_and_score(workers, remaining_batches(2 * batches, 2, []))


def completions_of(batch: slice) -> list[list[int]]:
    return [[i] for i in range(batch.start, batch.stop)]


def scores_of(batch: slice, completions: list[list[int]]) -> Scores:
    column = np.array(completions, dtype=float)
    return Scores(column, column, {"half": column[:, 0] / 2})


def scoring_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("score")]


def test_batches_come_in_order_with_their_rows_and_terms():
    whole = Rollout.join(beside(completions_of, scores_of))
    assert whole.rows == list(range(100, 112)) and whole.completions == [[i] for i in range(12)]
    assert whole.rewards[:, 0].tolist() == list(range(12))
    assert whole.terms["half"].tolist() == [i / 2 for i in range(12)]


def test_the_next_batch_is_sampled_while_one_is_scored():
    """Each batch waits in scoring until the next one has begun to be sampled."""
    begun = {start: threading.Event() for start in range(0, 12, 2)}

    def sample(batch):
        begun[batch.start].set()
        return completions_of(batch)

    def score(batch, completions):
        if batch.stop < 12:
            assert begun[batch.stop].wait(30)
        return scores_of(batch, completions)

    assert len(beside(sample, score)) == 6


def test_the_seconds_of_sampling_and_scoring_are_those_of_the_calls(monkeypatch):
    """A clock that only the calls advance: 2 s for each batch sampled, 3 s for each batch scored."""
    clock = threading.local()

    def advance(seconds):
        clock.now = getattr(clock, "now", 0.0) + seconds

    monkeypatch.setattr("quarkrl.training.overlap.time.perf_counter", lambda: getattr(clock, "now", 0.0))

    def sample(batch):
        advance(2.0)
        return completions_of(batch)

    def score(batch, completions):
        advance(3.0)
        return scores_of(batch, completions)

    whole = Rollout.join(beside(sample, score))
    assert whole.seconds_sample == 12.0 and whole.seconds_score == 18.0


def test_one_batch_is_scored_at_a_time_in_one_thread_in_order():
    seen: list[tuple[int, int]] = []

    def slow_score(batch, completions):
        seen.append((batch.start, threading.get_ident()))
        time.sleep(0.01)
        seen.append((batch.start, threading.get_ident()))
        return scores_of(batch, completions)

    beside(completions_of, slow_score, batches=4)
    assert [start for start, _ in seen] == [0, 0, 2, 2, 4, 4, 6, 6]
    assert len({thread for _, thread in seen}) == 1 and seen[0][1] != threading.get_ident()


def test_after_an_error_in_scoring_nothing_more_is_sampled():
    begun, failed, sampled = threading.Event(), threading.Event(), []

    def watched_sample(batch):
        sampled.append(batch.start)
        if batch.start:
            begun.set()
            failed.wait(10)
            time.sleep(0.05)
        return completions_of(batch)

    def broken(batch, completions):
        begun.wait(10)
        failed.set()
        raise UserError("quota")

    with pytest.raises(UserError, match="quota"):
        beside(watched_sample, broken)
    assert sampled == [0, 2] and not scoring_threads()


def test_after_an_error_in_sampling_scoring_is_stopped():
    stopped = threading.Event()

    def broken(batch):
        if batch.start == 4:
            raise RuntimeError("out of memory")
        return completions_of(batch)

    scored = []

    def endless(batch, completions):
        scored.append(batch.start)
        assert stopped.wait(30)
        return scores_of(batch, completions)

    with pytest.raises(RuntimeError, match="out of memory"):
        beside(broken, endless, stop=stopped.set)
    assert scored == [0] and not scoring_threads()


def test_ctrl_c_ends_a_reward_that_waits_and_leaves_no_thread():
    ended = []

    async def endless(completions):
        try:
            await asyncio.Event().wait()  # Never set.
        finally:
            ended.append(True)

    scorer = Scorer(endless)

    def wait_for_scores(batch, completions):
        return scorer(["p"] * 2, ["x"] * 2, completions)

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        beside(completions_of, wait_for_scores, stop=scorer.stop)
    assert ended == [True] and not scoring_threads()


# Several processes. Here each is a thread, and `Meetings` takes the place of `gather_object`.


class Meetings:
    """Gathers what two threads pass to it, and calls `before` and `after` with the process and the meeting's number."""

    def __init__(self, before=lambda rank, number: None, after=lambda rank, number: None):
        self.before, self.after = before, after
        self.barrier = threading.Barrier(2, timeout=10)
        self.messages: dict[int, object] = {}
        self.here = threading.local()

    def gather(self, message: list) -> list:
        rank, self.here.number = self.here.rank, getattr(self.here, "number", 0) + 1
        self.before(rank, self.here.number)
        self.messages[rank] = message[0]
        self.barrier.wait()
        messages = [self.messages[0], self.messages[1]]
        self.barrier.wait()
        self.after(rank, self.here.number)
        return messages


def errors_of_two(monkeypatch, meetings: Meetings, sample, score, stopping=None) -> list[str]:
    """Let two processes share six batches; return the message of the error that ends each."""
    monkeypatch.setattr("quarkrl.training.overlap.gather_object", meetings.gather)
    errors = ["", ""]

    def run(rank: int) -> None:
        meetings.here.rank = rank
        workers = Workers(
            rows=list(range(12)),
            sample=lambda batch: sample(rank, batch),
            score=lambda batch, completions: score(rank, batch, completions),
            stop_scoring=lambda: None,
            stop_requested=lambda: stopping is not None and stopping.is_set(),
        )
        try:
            SharedBatches(workers, remaining_batches(12, 2, []), rank, 2, None, samples_together=False).run()
        except (UserError, RuntimeError) as error:  # BrokenBarrierError is one, if the other thread does not meet.
            errors[rank] = f"{error}" or repr(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def sample_any(rank, batch):
    return completions_of(batch)


def test_a_score_that_fails_while_processes_meet_ends_all(monkeypatch):
    """The first score of process 1 fails once that process waits at its second meeting, and before the meeting ends."""
    waiting, failed = threading.Event(), threading.Event()

    def before(rank, number):
        if (rank, number) == (1, 2):
            waiting.set()
            assert failed.wait(10)
            time.sleep(0.05)  # Until the scoring thread has ended with the error.

    def score(rank, batch, completions):
        if rank == 1:
            assert waiting.wait(10)
            failed.set()
            raise UserError("quota")
        return scores_of(batch, completions)

    assert errors_of_two(monkeypatch, Meetings(before), sample_any, score) == ["process 1: quota", "quota"]


def test_a_score_that_fails_after_a_stop_ends_all(monkeypatch):
    """Both processes agree to stop at their second meeting; then the first score of process 1 fails."""
    stopping, stopped = threading.Event(), threading.Event()

    def after(rank, number):
        if number == 1:
            stopping.set()
        elif (rank, number) == (1, 2):
            stopped.set()

    def score(rank, batch, completions):
        if rank == 1:
            assert stopped.wait(10)
            raise UserError("quota")
        return scores_of(batch, completions)

    errors = errors_of_two(monkeypatch, Meetings(after=after), sample_any, score, stopping)
    assert errors == ["process 1: quota", "quota"]


def test_sampling_that_fails_in_one_process_ends_all(monkeypatch):
    def sample(rank, batch):
        if rank == 0:
            raise RuntimeError("out of memory")
        return completions_of(batch)

    def score(rank, batch, completions):
        return scores_of(batch, completions)

    assert errors_of_two(monkeypatch, Meetings(), sample, score) == ["out of memory", "process 0: out of memory"]
