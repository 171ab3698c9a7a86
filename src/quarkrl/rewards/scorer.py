"""`Scorer`: the scores of one or several reward functions, combined into one array of rewards."""

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from quarkrl.errors import UserError
from quarkrl.names import unique_names
from quarkrl.rewards.batch import Batch
from quarkrl.rewards.cache import ScoreCache
from quarkrl.rewards.cached_calls import CacheCounts, CachedCall
from quarkrl.rewards.calling import RewardCall, RewardCaller
from quarkrl.rewards.identity import identity_of, name_of
from quarkrl.rewards.registry import resolve
from quarkrl.rewards.reward import Reward, is_cached
from quarkrl.rewards.validation import attribute_names, checked_scores, checked_weights


@dataclass
class Scores:
    """The scores of n completions; NaN is a missing score (None, NaN or infinite).

    Attributes:
        rewards: (n, A) float64, one column per attribute: the values that the pool's quantiles are made of.
        components: (n, R) float64, each reward function's scores without weights.
        terms: the scores of each reward, by name, if `rewards` is their sum; else empty. Each is of shape (n,).
        extra: by name, n texts or Nones: the columns that rewards have logged by `log_extra`.
        metrics: by name, the numbers that rewards have logged by `log_metric`.
    """

    rewards: np.ndarray
    components: np.ndarray
    terms: dict[str, np.ndarray] = field(default_factory=dict)
    extra: dict[str, list[str | None]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


class Scorer:
    """Scores completions by one or several reward functions.

    Args:
        reward_funcs: one or several reward functions (`quarkrl.rewards.reward.Reward`), or their names or paths
            (`quarkrl.rewards.resolve`).
        weights: one number per reward. Default: 1 each.
        condition_on: with "sum", the rewards become their weighted sum, which is missing if one of its terms is
            missing. With "each", the scorer keeps every reward as an attribute of its own.
        cache: a file in which a `ScoreCache` stores the scores of rewards that have an `identity`.
        timeout: seconds that the scores of one batch may take. None waits without limit.

    Attributes:
        names: the rewards' names, made unique, of letters, digits, "_" and "-".
        attributes: ("reward",) for "sum", `names` for "each".
        identity: the provenance of the scores, one JSON-able dict per reward, with its weight.
        unwanted: what 1 - reward measures, such as "toxicity", if there is one reward and it is a probability.
        wanted: the class that a high reward indicates, such as "positive", if there is one reward of that kind.
        wanted_from: the reward from which a text counts as `wanted`; None leaves it to the evaluation's threshold.

    Raises:
        UserError: a reward cannot be resolved, an option is invalid, or the cache cannot be used.
    """

    def __init__(
        self,
        reward_funcs: str | Reward | Sequence[str | Reward],
        weights: Sequence[float] | None = None,
        condition_on: str = "sum",
        cache: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ):
        several = isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str)
        specs = list(cast(Sequence[str | Reward], reward_funcs)) if several else [cast(str | Reward, reward_funcs)]
        if not specs:
            raise UserError("reward: must name at least one reward function.")
        if condition_on not in ("sum", "each"):
            raise UserError(f"condition_on {condition_on!r}: must be 'sum' or 'each'.")
        if weights is not None and condition_on == "each":
            raise UserError(f"reward_weights {weights}: must be unset with condition_on 'each', which sums nothing.")
        if timeout is not None and not timeout > 0:
            raise UserError(f"reward_timeout {timeout}: must be above 0 seconds, or none to wait without limit.")
        cache = None if cache is None else os.path.abspath(os.path.expanduser(cache))  # A reward may change directory.
        self._rewards = [resolve(spec) for spec in specs]
        self._weights = checked_weights(weights, len(specs))
        self._caller = RewardCaller(timeout)
        self.names = attribute_names(name_of(reward) for reward in self._rewards)
        self.attributes = ("reward",) if condition_on == "sum" else self.names
        self.condition_on = condition_on
        pairs = zip(self._rewards, self._weights, strict=True)
        self.identity = [{**identity_of(reward), "weight": weight} for reward, weight in pairs]
        # Class and threshold of a single reward; a weight would change what its values mean.
        single = self._rewards[0] if self._weights == [1.0] else None
        self.unwanted: str | None = getattr(single, "unwanted", None)
        self.wanted: str | None = None if self.unwanted else getattr(single, "wanted", None)
        self.wanted_from: float | None = None if self.unwanted else getattr(single, "wanted_from", None)
        self._cache_counts = CacheCounts()
        self._cache = None if cache is None else self._open_cache(cache)

    def _open_cache(self, path: str | os.PathLike[str]) -> ScoreCache:
        if not any(map(is_cached, self._rewards)):
            raise UserError(
                f"score_cache {os.fspath(path)!r}: must be unset, because {', '.join(self.names)} cannot be cached. "
                "Remove score_cache, or give the reward an attribute `identity` (docs/rewards.md)."
            )
        return ScoreCache(path)

    def __call__(
        self,
        prompts: list[str] | list[str | list[dict]],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]] | None = None,
        end_ids: Sequence[int] = (),
        trainer_state: Any = None,
    ) -> Scores:
        """Score n completions.

        Args:
            prompts: n texts or chats.
            completions: n texts.
            completion_ids: n lists of token ids, EOS included; empty lists if there are no ids.
            columns: the data set's other columns, n values each.
            end_ids: the token ids that end a completion, for rewards that have a parameter of this name.
            trainer_state: the `transformers.TrainerState` that rewards receive; None outside training.

        Raises:
            UserError: a reward raised an exception, exceeded the time-out, or did not return n numbers or Nones.
        """
        batch = Batch.of(prompts, completions, completion_ids, columns or {}, end_ids, trainer_state)
        components = np.empty((len(batch), len(self.names)))  # (n, R)
        calls: list[RewardCall] = []
        if len(batch):
            calls = [self._call(name, reward, batch) for name, reward in zip(self.names, self._rewards, strict=True)]
            for r, (name, result) in enumerate(zip(self.names, self._caller.run(calls), strict=True)):
                scores = checked_scores(name, result, len(batch))
                components[:, r] = [math.nan if score is None else score for score in scores]
        # A missing term makes the sum missing, whatever its weight: NaN · 0 is NaN.
        rewards = components if self.condition_on == "each" else components @ np.array(self._weights)[:, None]
        is_sum = self.condition_on == "sum" and len(self.names) > 1
        terms = dict(zip(self.names, components.T, strict=True)) if is_sum else {}
        return Scores(rewards.copy(), components, terms, *_join_logs(calls))

    def _call(self, name: str, reward: Reward, batch: Batch) -> RewardCall:
        if self._cache is not None and is_cached(reward):
            return CachedCall(name, reward, batch, self._cache, self._cache_counts)
        return RewardCall(name, reward, batch)

    @property
    def attribute_rewards(self) -> tuple[str, ...]:
        """For each attribute the name of its reward; that of a sum of several is the attribute's own."""
        return self.names if self.condition_on == "each" or len(self.names) == 1 else self.attributes

    @property
    def is_async(self) -> bool:
        """Whether a reward is async, as those are that ask a server."""
        functions = [call for reward in self._rewards for call in (reward, type(reward).__call__)]
        return any(map(inspect.iscoroutinefunction, functions))

    def stop(self) -> None:
        """End the call that another thread has in progress, if any. Async rewards are cancelled.

        A plain reward function ends first. Scores that are already in the cache stay there.
        """
        self._caller.stop()

    @property
    def cache_size(self) -> int | None:
        """How many scores the cache file holds, those of other runs included; None without a cache."""
        return None if self._cache is None else len(self._cache)

    @property
    def cache_hits(self) -> int:
        """How many scores this scorer has taken from the cache."""
        return self._cache_counts.hits

    @property
    def cache_misses(self) -> int:
        """How many scores of cached rewards this scorer has requested from the rewards."""
        return self._cache_counts.misses


def _join_logs(calls: Sequence[RewardCall]) -> tuple[dict[str, list[str | None]], dict[str, list[float]]]:
    """The columns and the metrics that rewards have logged. A second column `x`, of another reward, becomes `x-2`."""
    columns: dict[str, list[str | None]] = {}
    metrics: dict[str, list[float]] = {}
    for call in calls:
        for name, column in call.batch.log.columns(call.name).items():
            columns[unique_names([name], columns)[0]] = column
        for name, values in call.batch.log.metrics().items():
            metrics.setdefault(name, []).extend(values)
    return columns, metrics
