"""Call reward functions, plain or async, in a thread of their own, within a time-out, and stop them."""

import asyncio
import inspect
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any

from quarkrl.errors import UserError, describe_exception
from quarkrl.models.device import current_gpu, keep_autocast_cache, use_gpu
from quarkrl.rewards.batch import Batch
from quarkrl.rewards.giving_up import end_frozen_process, kill_children
from quarkrl.rewards.identity import source_file
from quarkrl.rewards.reward import Reward

GRACE_SECONDS = 1.0  # How long an async reward may take to end after its cancellation.
_SIGNAL_REMEDY = (
    ". Rewards run in a thread of their own, where signal.alarm does not work: use the time-out of a library, or a "
    "child process"
)


@contextmanager
def one_line_errors(name: str) -> Iterator[None]:
    """Turn an exception of a reward, `sys.exit` included, into a `UserError` of one line with file and line.

    KeyboardInterrupt and cancellation pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        text = str(error)
        remedy = _SIGNAL_REMEDY if "main thread" in text or "signal.alarm" in text else ""
        raise UserError(f"reward {name!r} raised {describe_exception(error)}{remedy}") from error


def call_reward(name: str, reward: Reward, batch: Batch) -> Any:
    """Call `reward` with the arguments that it accepts, and return its scores, or an awaitable if it is async."""
    arguments = batch.arguments_for(name, reward)
    with one_line_errors(name):
        return reward(**arguments)


async def await_scores(name: str, scores: Awaitable[Any]) -> Any:
    """Await the scores of an async reward."""
    with one_line_errors(name):
        return await scores


def close_unawaited(result: Any) -> None:
    """Close a coroutine that was never awaited, and those it holds: Python would print a warning after the error."""
    if inspect.iscoroutine(result):
        for local in inspect.getcoroutinelocals(result).values():
            close_unawaited(local)
        result.close()


class RewardCall:
    """A call of one reward for one batch.

    Args:
        name: the reward's name, for error messages.
        reward: the function to call.
        batch: the arguments.
    """

    def __init__(self, name: str, reward: Reward, batch: Batch):
        self.name, self.reward, self.batch = name, reward, batch.with_own_log()

    def start(self, stop_requested: threading.Event) -> Any:
        """Return the scores, or an awaitable of them if the reward is async.

        A call with several requests stops before the next one if `stop_requested` is set.
        """
        return call_reward(self.name, self.reward, self.batch)


class _Run:
    """The state of one batch. A run that is abandoned keeps its request to stop; the next run has its own."""

    def __init__(self, calls: Sequence[RewardCall]):
        self.calls = list(calls)
        self.began = time.time()
        self.unanswered: list[RewardCall] = []  # The calls that are in progress.
        self.stop_requested = threading.Event()

    @property
    def unanswered_names(self) -> str:
        return ", ".join(repr(call.name) for call in self.unanswered)


class RewardCaller:
    """Runs the reward calls of one batch at a time: plain rewards in order, async rewards concurrently.

    It owns the event loop of the async rewards, the thread that they run in, and the request to stop. Rewards always
    run in a thread of their own, so that they behave alike in every command. `run` is called in one thread at a time;
    `stop` may be called in any thread.

    Args:
        timeout: seconds that the calls of a batch may take together; None waits without limit.
        grace: seconds that the calls may take to end after a time-out or Ctrl-C has stopped them.
    """

    def __init__(self, timeout: float | None = None, grace: float = GRACE_SECONDS):
        self._timeout = timeout and min(timeout, threading.TIMEOUT_MAX)
        self._grace = grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._current: _Run | None = None
        self._hanging: _Run | None = None  # A run whose thread did not end and cannot be killed.

    def run(self, calls: Sequence[RewardCall]) -> list[Any]:
        """Return what each call returned, in order.

        Raises:
            UserError: a call failed or exceeded the time-out, or a call of an earlier batch still runs.
            CancelledError: `stop` ended the run.
        """
        if self._hanging is not None:
            raise UserError(
                f"reward {self._hanging.unanswered_names} is still running after its time-out. Start a new process."
            )
        run = self._current = _Run(calls)
        try:
            return self._run_in_time(run)
        finally:
            self._current = None

    def stop(self) -> None:
        """Stop the run that another thread has in progress, if any. Async rewards are cancelled.

        A plain reward ends first. Scores that are already in the cache stay there.
        """
        run = self._current
        if run is not None and not run.stop_requested.is_set():
            run.stop_requested.set()
            # In this order: `_run_in_loop` assigns the loop and then reads `stop_requested`.
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._cancel_tasks, run)

    def _cancel_tasks(self, run: _Run) -> None:
        """Cancel all tasks of the loop, unless they belong to a later run."""
        if self._loop is not None and (run is self._current or run is self._hanging):
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

    def _run_in_time(self, run: _Run) -> list[Any]:
        thread, has_ended = None, False
        try:
            with end_frozen_process(self._timeout):
                thread = BackgroundCall(partial(self._run_calls, run))
                has_ended = thread.has_ended(self._timeout)
            if has_ended:
                return thread.result()
            names = run.unanswered_names
            location = thread.location(source_file(run.unanswered[0].reward)) if run.unanswered else ""
        finally:  # Ctrl-C arrives here too.
            if thread and not has_ended:
                self._give_up(run, thread)
        count = len(run.calls[0].batch)
        raise UserError(
            f"reward {names} did not score {count} completions within {self._timeout:g} s{location}. "
            "Fix the reward or raise --reward_timeout."
        )

    def _give_up(self, run: _Run, thread: "BackgroundCall") -> None:
        """Stop a run, and kill the child processes that it has started: at exit, Python would wait for them."""
        self.stop()
        thread.has_ended(self._grace)
        kill_children(run.began)
        if not thread.has_ended(self._grace):
            self._hanging = run

    def _run_calls(self, run: _Run) -> list[Any]:
        results: list[Any] = []
        try:
            for call in run.calls:
                run.unanswered = [call]
                results.append(call.start(run.stop_requested))
        except BaseException:
            for result in results:
                close_unawaited(result)
            raise
        pending = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
        if pending:
            run.unanswered = [run.calls[index] for index in pending]
            awaitables = [self._await_call(run, run.calls[index], results[index]) for index in pending]
            for index, result in zip(pending, self._run_in_loop(run, awaitables), strict=True):
                results[index] = result
        return results

    async def _await_call(self, run: _Run, call: RewardCall, scores: Awaitable[Any]) -> Any:
        result = await await_scores(call.name, scores)
        run.unanswered.remove(call)
        return result

    def _run_in_loop(self, run: _Run, awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
        # One loop for the caller's life: an HTTP client that a reward keeps does not survive the end of its loop.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            weakref.finalize(self, _close_loop, self._loop)
        if run.stop_requested.is_set():
            for awaitable in awaitables:
                close_unawaited(awaitable)
            raise CancelledError

        async def gather() -> list[Any]:
            return await asyncio.gather(*awaitables)

        try:
            return self._loop.run_until_complete(gather())
        except BaseException:  # Ctrl-C included: no task may outlive the run.
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()

            async def settle() -> None:
                await asyncio.gather(*tasks, return_exceptions=True)

            self._loop.run_until_complete(settle())
            raise


class BackgroundCall:
    """Runs a function in a daemon thread, which cannot be killed but does not keep the process alive.

    Args:
        function: what to run. It sees the current GPU of the thread that creates this object.
    """

    def __init__(self, function: Callable[[], Any]):
        self._outcome: Future[Any] = Future()
        gpu = current_gpu()

        def run() -> None:
            try:
                use_gpu(gpu)
                # Recorded steps of the sampler read from the cache of autocast.
                keep_autocast_cache()
                self._outcome.set_result(function())
            except BaseException as error:  # noqa: BLE001 - `result` raises it.
                self._outcome.set_exception(error)

        self._thread = threading.Thread(target=run, name="reward", daemon=True)
        self._thread.start()

    def has_ended(self, seconds: float | None) -> bool:
        """Wait at most this long for the function to end, without limit for None, and return whether it has."""
        return not wait([self._outcome], seconds).not_done

    def result(self) -> Any:
        """Wait for the function; return its result or raise its exception."""
        return self._outcome.result()

    def location(self, file: str | None) -> str:
        """The innermost line of `file` that is being executed, as " (file:line)", or "" if there is none."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        lines = [line for line in traceback.extract_stack(frame) if line.filename == file] if frame else []
        return f" ({lines[-1].filename}:{lines[-1].lineno})" if lines else ""


def _close_loop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_running():  # It still runs, in its own thread, if a reward hangs.
        loop.close()
