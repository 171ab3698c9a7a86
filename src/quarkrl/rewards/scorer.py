"""One or several reward functions, called kindly, checked strictly, and made into one array of rewards."""

import asyncio
import inspect
import math
import numbers
import re
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from quarkrl.errors import UserError
from quarkrl.rewards.functions import describe, identity_of, name_of

Reward = str | Callable[..., Any]


@dataclass
class Scores:
    """What a Scorer gives for n completions; NaN where a reward has no score (None, NaN or infinite)."""

    rewards: np.ndarray  # (n, A) float64: what quantiles are cut by, one column per attribute
    components: np.ndarray  # (n, R) float64: each reward function's own scores, unweighted


class Scorer:
    """Scores completions by one or several reward functions.

    Args:
        reward_funcs: one or a list of callables, names or paths (see `quarkrl.rewards.resolve`).
        weights: one number per reward; 1 each by default.
        condition_on: "sum" makes one reward of the weighted sum, missing where any of its terms is;
            "each" keeps every reward as an attribute of its own.

    Attributes:
        names: the rewards' names, made unique, of letters, digits, "_" and "-".
        attributes: ("reward",) for "sum", `names` for "each".
        identity: what scored, one JSON-able dict per reward, with its weight.
        unwanted: what 1 - reward measures, such as "toxicity", where there is one reward, a probability.

    Raises:
        UserError: a reward cannot be resolved, or the weights do not fit.
    """

    def __init__(
        self,
        reward_funcs: Reward | Sequence[Reward],
        weights: Sequence[float] | None = None,
        condition_on: str = "sum",
    ):
        from quarkrl.rewards import resolve  # here, because that module imports this one

        several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
        specs = list(cast(Sequence[Reward], reward_funcs)) if several else [cast(Reward, reward_funcs)]
        if not specs:
            raise UserError("no reward is given: give at least one")
        if condition_on not in ("sum", "each"):
            raise UserError(f"condition_on is {condition_on!r}: 'sum' or 'each' is wanted")
        if weights is not None and condition_on == "each":
            raise UserError("weights are for a sum, and condition_on='each' makes none: leave the weights out")
        self._functions = [resolve(spec) for spec in specs]
        self._weights = _checked_weights(weights, len(specs))
        self._loop: asyncio.AbstractEventLoop | None = None
        self.names = _attribute_names(name_of(function) for function in self._functions)
        self.attributes = ("reward",) if condition_on == "sum" else self.names
        self.condition_on = condition_on
        pairs = zip(self._functions, self._weights, strict=True)
        self.identity = [{**identity_of(function), "weight": weight} for function, weight in pairs]
        self.unwanted: str | None = None
        if self._weights == [1.0]:
            self.unwanted = getattr(self._functions[0], "unwanted", None)

    def __call__(
        self,
        prompts: list[str] | list[str | list[dict]],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]] | None = None,
    ) -> Scores:
        """Scores of n completions; `columns` holds the data set's other columns, n values each.

        Raises:
            UserError: a reward raised, or returned something other than n numbers or Nones.
        """
        given: dict[str, list[Any]] = {**(columns or {}), "prompts": prompts, "completions": completions}
        given["completion_ids"] = completion_ids
        n = len(completions)
        assert all(len(values) == n for values in given.values())
        components = np.empty((n, len(self.names)))  # (n, R)
        if n:
            for r, (name, result) in enumerate(zip(self.names, self._call_all(given), strict=True)):
                components[:, r] = _checked_scores(name, result, n)
        # A missing term makes the sum missing, whatever its weight: NaN · 0 is NaN.
        rewards = components if self.condition_on == "each" else components @ np.array(self._weights)[:, None]
        return Scores(rewards=rewards.copy(), components=components)

    def _call_all(self, given: dict[str, list[Any]]) -> list[Any]:
        results: list[Any] = []
        try:
            for name, function in zip(self.names, self._functions, strict=True):
                results.append(_call(name, function, given))
        except BaseException:
            for result in results:
                if inspect.iscoroutine(result):
                    result.close()  # or Python warns that it was never awaited, after the error that matters
            raise
        pending = {r: _named(self.names[r], x) for r, x in enumerate(results) if inspect.isawaitable(x)}
        if pending:
            for r, result in zip(pending, self._wait_for(list(pending.values())), strict=True):
                results[r] = result
        return results

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
            weakref.finalize(self, self._loop.close)

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


def _call(name: str, function: Callable[..., Any], given: dict[str, list[Any]]) -> Any:
    arguments = _accepted(name, function, given)
    try:
        return function(**arguments)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward {name!r} raised {describe(error)}") from error


async def _named(name: str, result: Awaitable[Any]) -> Any:
    try:
        return await result
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward {name!r} raised {describe(error)}") from error


def _accepted(name: str, function: Callable[..., Any], given: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """As much of `given` as the function takes: all of it, where it has **kwargs or tells nothing."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return given
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [p.name for p in by_name if p.default is p.empty and p.name not in given]
    if missing:
        raise UserError(f"reward {name!r} asks for {missing[0]!r}; there are {', '.join(given)}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    return {p.name: given[p.name] for p in by_name if p.name in given}


def _checked_scores(name: str, result: Any, n: int) -> list[float]:
    listed = result.tolist() if hasattr(result, "tolist") else result  # NumPy, torch, pandas
    if not isinstance(listed, (list, tuple)):
        raise UserError(f"reward {name!r} returned {_shown(result)}: a list of {n} numbers is wanted")
    if len(listed) != n:
        raise UserError(f"reward {name!r} returned {len(listed)} scores for {n} completions: return {n}")
    return [_checked_score(name, index, value) for index, value in enumerate(listed)]


def _checked_score(name: str, index: int, value: Any) -> float:
    if value is None:
        return math.nan
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a NumPy or torch scalar
    if not isinstance(value, numbers.Real):
        raise UserError(f"reward {name!r} returned {_shown(value)} at index {index}: a number or None is wanted")
    return float(value) if math.isfinite(value) else math.nan


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else text[:59] + "…"
    return text if value is None else f"{text} (of type {type(value).__name__})"


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    values = [weights] if isinstance(weights, numbers.Real) else list(weights)
    if len(values) != count:
        raise UserError(f"{len(values)} weights are given for {count} rewards: one each is wanted")
    for value in values:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"weight {value!r} is not a finite number")
    return [float(value) for value in values]


def _attribute_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names as reward tokens can hold them: letters, digits, "_" and "-"; a second `x` becomes `x-2`."""
    unique: list[str] = []
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "reward"
        candidate, count = base, 1
        while candidate in unique:
            count += 1
            candidate = f"{base}-{count}"
        unique.append(candidate)
    return tuple(unique)
