"""One or several reward functions, called kindly, checked strictly, and made into one array of rewards."""

import asyncio
import inspect
import math
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np

from quarkrl.errors import UserError
from quarkrl.rewards.cache import ScoreCache, digest
from quarkrl.rewards.calling import InThread
from quarkrl.rewards.custom import describe, identity_of, name_of, source_file
from quarkrl.rewards.registry import resolve
from quarkrl.rewards.validation import attribute_names, checked_scores, checked_weights

Reward = str | Callable[..., Any]

# Texts asked for between two commits to the score cache: what a crash can cost, of a reward that tells no score before
# it has them all.
_COMMIT_EVERY = 256
_GRACE = 1.0  # seconds that an async reward has to end in, once it is given up


@dataclass
class Scores:
    """What a Scorer gives for n completions; NaN where a reward has no score (None, NaN or infinite)."""

    rewards: np.ndarray  # (n, A) float64: what quantiles are cut by, one column per attribute
    components: np.ndarray  # (n, R) float64: each reward function's own scores, unweighted
    terms: dict[str, np.ndarray] = field(default_factory=dict)  # by name, those that `rewards` sums: (n,) each


class Scorer:
    """Scores completions by one or several reward functions.

    Args:
        reward_funcs: one or a list of callables, names or paths (see `quarkrl.rewards.resolve`).
        weights: one number per reward; 1 each by default.
        condition_on: "sum" makes one reward of the weighted sum, missing where any of its terms is;
            "each" keeps every reward as an attribute of its own.
        cache: a file that keeps scores (`ScoreCache`) of the reward functions that say who they are by an attribute
            `identity`, unless their `cached` is False. A score is found again by what the function reads: the
            arguments that its attribute `reads` names, such as ("completions",), else all that it accepts. None is
            kept, as a score that there is not; NaN is asked for again.
        timeout: seconds that the scores of a call may take; then the call fails, also where a function hangs that
            cannot be stopped. None waits for ever.

    Attributes:
        names: the rewards' names, made unique, of letters, digits, "_" and "-".
        attributes: ("reward",) for "sum", `names` for "each".
        identity: what scored, one JSON-able dict per reward, with its weight.
        unwanted: what 1 - reward measures, such as "toxicity", where there is one reward, a probability.
        wanted: the class that the reward tells, such as "positive", where there is one reward of that kind.
        wanted_from: from which reward on a text counts as of that class; None for a probability, whose reader decides.
        cache_misses, cache_hits: numbers of scores of cached rewards that were computed, and that the cache held.

    Raises:
        UserError: a reward cannot be resolved, the weights or the time-out do not fit, or the cache cannot be used.
    """

    def __init__(
        self,
        reward_funcs: Reward | Sequence[Reward],
        weights: Sequence[float] | None = None,
        condition_on: str = "sum",
        cache: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ):
        several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
        specs = list(cast(Sequence[Reward], reward_funcs)) if several else [cast(Reward, reward_funcs)]
        if not specs:
            raise UserError("no reward is given: give at least one")
        if condition_on not in ("sum", "each"):
            raise UserError(f"condition_on is {condition_on!r}: 'sum' or 'each' is wanted")
        if weights is not None and condition_on == "each":
            raise UserError("weights are for a sum, and condition_on='each' makes none: leave the weights out")
        if timeout is not None and not timeout > 0:
            raise UserError(f"reward_timeout {timeout}: want more than 0 seconds, or none to wait for ever")
        self._timeout = timeout and min(timeout, threading.TIMEOUT_MAX)
        self._functions = [resolve(spec) for spec in specs]
        self._weights = checked_weights(weights, len(specs))
        self._loop: asyncio.AbstractEventLoop | None = None
        self.names = attribute_names(name_of(function) for function in self._functions)
        self.attributes = ("reward",) if condition_on == "sum" else self.names
        self.condition_on = condition_on
        pairs = zip(self._functions, self._weights, strict=True)
        self.identity = [{**identity_of(function), "weight": weight} for function, weight in pairs]
        self.unwanted: str | None = None
        if self._weights == [1.0]:
            self.unwanted = getattr(self._functions[0], "unwanted", None)
        self.wanted: str | None = None
        self.wanted_from: float | None = None
        if self._weights == [1.0] and not self.unwanted:
            self.wanted = getattr(self._functions[0], "wanted", None)
            self.wanted_from = getattr(self._functions[0], "wanted_from", None)
        self.cache_misses = self.cache_hits = 0
        self._cache: ScoreCache | None = None
        if cache is not None:
            if not any(map(is_cached, self._functions)):
                raise UserError(
                    f"score_cache {os.fspath(cache)!r}: nothing of {', '.join(self.names)} is kept there, as of a "
                    "function that has an attribute `identity` (docs/rewards.md): leave score_cache out"
                )
            self._cache = ScoreCache(cache)
        self._calling = self._stopping = self._hangs = False
        self._unanswered: list[str] = []  # the rewards that are being asked

    def __call__(
        self,
        prompts: list[str] | list[str | list[dict]],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]] | None = None,
        end_ids: Sequence[int] = (),
    ) -> Scores:
        """Scores of n completions.

        Args:
            prompts: n texts or chats.
            completions: n texts.
            completion_ids: n lists of token ids, EOS included; empty lists where there are none.
            columns: the data set's other columns, n values each.
            end_ids: which ids are EOS; for a reward function that has a parameter of this name.

        Raises:
            UserError: a reward raised, took too long, or returned something other than n numbers or Nones.
        """
        given: dict[str, list[Any]] = {**(columns or {}), "prompts": prompts, "completions": completions}
        given["completion_ids"] = completion_ids
        n = len(completions)
        assert all(len(values) == n for values in given.values())
        given |= {_END_IDS: list(end_ids), _ON_SCORE: lambda row, score: None}  # type: ignore[dict-item]
        components = np.empty((n, len(self.names)))  # (n, R)
        if n:
            if self._hangs:
                raise UserError(f"{_rewards(self._unanswered)} still hangs: start a new process")
            self._calling = True
            try:
                results = self._call_all(given) if self._timeout is None else self._call_in_time(given, self._timeout)
            finally:
                # What hangs shall find, should it ever go on, that it need not.
                self._calling, self._stopping = False, self._hangs
            for r, (name, result) in enumerate(zip(self.names, results, strict=True)):
                components[:, r] = [math.nan if x is None else x for x in checked_scores(name, result, n)]
        # A missing term makes the sum missing, whatever its weight: NaN · 0 is NaN.
        rewards = components if self.condition_on == "each" else components @ np.array(self._weights)[:, None]
        summed = self.condition_on == "sum" and len(self.names) > 1
        terms = dict(zip(self.names, components.T, strict=True)) if summed else {}
        return Scores(rewards.copy(), components, terms)

    @property
    def cache_size(self) -> int | None:
        """How many scores the cache holds, of this run and of others; None where there is no cache."""
        return None if self._cache is None else len(self._cache)

    def stop(self) -> None:
        """End the call that is running in another thread, if there is one: answers awaited are given up.

        A reward function that is not async ends first. What was committed to the cache stays.
        """
        if self._calling and not self._stopping:
            self._stopping = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        if self._stopping and self._loop is not None:  # Else the call has ended, and this is the next one's loop.
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

    def _call_in_time(self, given: dict[str, list[Any]], timeout: float) -> list[Any]:
        call = InThread(partial(self._call_all, given))
        try:
            if call.ended(timeout):
                return call.result()
            names, place = list(self._unanswered), call.place(self._source(self._unanswered))
        finally:  # Ctrl-C comes this way too
            if not call.ended(0):
                self.stop()
                self._hangs = not call.ended(_GRACE)
        raise UserError(
            f"{_rewards(names)} did not score {len(given['completions'])} completions within {timeout:g} s{place}: "
            "mend it, or raise --reward_timeout; then resume the run"
        )

    def _source(self, names: Sequence[str]) -> str | None:
        """The file of the first of these rewards, where it has one."""
        function = self._functions[self.names.index(names[0])] if names else None
        return source_file(function) if function else None

    def _call_all(self, given: dict[str, list[Any]]) -> list[Any]:
        results: list[Any] = []
        try:
            for name, function in zip(self.names, self._functions, strict=True):
                self._unanswered = [name]
                kept = self._cache is not None and is_cached(function)
                results.append((self._ask_missing if kept else _call)(name, function, given))
        except BaseException:
            for result in results:
                _discard(result)
            raise
        pending = {r: self._answer(self.names[r], x) for r, x in enumerate(results) if inspect.isawaitable(x)}
        if pending:
            self._unanswered = [self.names[r] for r in pending]
            for r, result in zip(pending, self._wait_for(list(pending.values())), strict=True):
                results[r] = result
        return results

    async def _answer(self, name: str, result: Awaitable[Any]) -> Any:
        answer = await _named(name, result)
        self._unanswered.remove(name)
        return answer

    def _ask_missing(self, name: str, function: Callable[..., Any], given: dict[str, list[Any]]) -> Any:
        """What the cache has, and answers for the rest, each distinct text once; a coroutine for an async function."""
        assert self._cache is not None
        cache, identity = self._cache, identity_of(function)
        digests = _digests(name, function, given)
        scores = cache.get(identity, set(digests))
        self.cache_hits += sum(key in scores for key in digests)
        rows = {key: row for row, key in enumerate(digests) if key not in scores}
        starts = range(0, len(rows), _COMMIT_EVERY)
        parts = [dict(list(rows.items())[start : start + _COMMIT_EVERY]) for start in starts]

        def ask(part: dict[bytes, int]) -> Any:
            if self._stopping:
                raise CancelledError
            self.cache_misses += len(part)
            keys = list(part)

            def on_score(row: int, score: float | None) -> None:
                keep(keys[row : row + 1], [score])

            rows: dict[str, Any] = _rows(given, list(part.values()))
            return _call(name, function, rows | {_ON_SCORE: on_score})

        def keep(part: Collection[bytes], result: Any) -> None:
            found = dict(zip(part, checked_scores(name, result, len(part)), strict=True))
            # NaN is no answer, and no score either: next time the function is asked again.
            new = {key: x for key, x in found.items() if key not in scores and (x is None or x == x)}
            scores.update(found)
            if new:
                cache.put(identity, new)

        async def answers(first: Awaitable[Any]) -> list[float | None]:
            keep(parts[0], await _named(name, first))
            for part in parts[1:]:
                keep(part, await _named(name, ask(part)))
            return [scores[key] for key in digests]

        for part in parts:
            result = ask(part)
            if inspect.isawaitable(result):
                return answers(result)
            keep(part, result)
        return [scores[key] for key in digests]

    def _wait_for(self, awaitables: list[Awaitable[Any]]) -> list[Any]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._run(awaitables)
        with ThreadPoolExecutor(1) as thread:  # a notebook's loop occupies this thread and cannot be nested
            return thread.submit(self._run, awaitables).result()

    def _run(self, awaitables: list[Awaitable[Any]]) -> list[Any]:
        # One loop for the Scorer's life: an HTTP client that a reward keeps does not survive its loop's end.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            weakref.finalize(self, _close, self._loop)
        if self._stopping:
            for awaitable in awaitables:
                _discard(awaitable)
            raise CancelledError

        async def gather() -> list[Any]:
            return await asyncio.gather(*awaitables)

        try:
            return self._loop.run_until_complete(gather())
        except BaseException:  # Ctrl-C included: nothing is left running
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()

            async def settle() -> None:
                await asyncio.gather(*tasks, return_exceptions=True)

            self._loop.run_until_complete(settle())
            raise


# The arguments that are not a value for each completion: which ids are EOS; what a reward may call with the row and
# the score of each completion as soon as it has it, in the thread that it is called in, for the cache to keep.
_END_IDS, _ON_SCORE = "end_ids", "on_score"
_COMMON = (_END_IDS, _ON_SCORE)


def _rows(given: dict[str, list[Any]], rows: list[int]) -> dict[str, Any]:
    return {name: values if name in _COMMON else [values[row] for row in rows] for name, values in given.items()}


def _rewards(names: Sequence[str]) -> str:
    return f"reward {', '.join(map(repr, names))}"


def _close(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_running():  # It does, in a thread of its own, where a reward hangs.
        loop.close()


def is_cached(function: Callable[..., Any]) -> bool:
    """A function that does not say who it is might score otherwise tomorrow."""
    return getattr(function, "identity", None) is not None and getattr(function, "cached", True)


def _digests(name: str, function: Callable[..., Any], given: dict[str, list[Any]]) -> list[bytes]:
    """For each completion, the digest of what the function reads of it."""
    accepted = _accepted(name, function, given)
    reads = getattr(function, "reads", None)
    read = [argument for argument in (accepted if reads is None else reads) if argument not in _COMMON]
    if unknown := [argument for argument in read if argument not in given]:
        raise UserError(f"reward {name!r} reads {unknown[0]!r}; there are {', '.join(_offered(given))}")
    try:
        rows = zip(*(given[argument] for argument in read), strict=True)
        return [digest(dict(zip(read, row, strict=True))) for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward {name!r} cannot be cached by {', '.join(read)} ({error}): "
            "let an attribute `reads` name the arguments it needs"
        ) from error


def _call(name: str, function: Callable[..., Any], given: dict[str, list[Any]]) -> Any:
    arguments = _accepted(name, function, given)
    try:
        return function(**arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name!r} raised {describe(error)}") from error


def _discard(result: Any) -> None:
    """Close a coroutine that never began, or Python warns of that, after the error that matters."""
    if inspect.iscoroutine(result):
        for held in inspect.getcoroutinelocals(result).values():
            _discard(held)
        result.close()


async def _named(name: str, result: Awaitable[Any]) -> Any:
    try:
        return await result
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"reward {name!r} raised {describe(error)}") from error


def _accepted(name: str, function: Callable[..., Any], given: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """As much of `given` as the function takes: all of it, where it tells nothing or has **kwargs (**_ drops them)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return _offered(given)
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in by_name if p.default is p.empty and p.name not in given]
    if missing:
        raise UserError(f"reward {name!r} asks for {missing[0]!r}; there are {', '.join(_offered(given))}")
    named = {p.name: given[p.name] for p in by_name if p.name in given}
    everything = any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in parameters)
    return {**named, **_offered(given)} if everything else named


def _offered(given: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What has a value for each completion."""
    return {name: values for name, values in given.items() if name not in _COMMON}
