"""`CachedCall`: call a reward only for the texts that the score cache lacks, and store its answers."""

import inspect
from collections.abc import Awaitable, Collection, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from threading import Event
from typing import Any

from quarkrl.errors import UserError
from quarkrl.rewards.batch import Batch
from quarkrl.rewards.cache import ScoreCache, digest
from quarkrl.rewards.calling import RewardCall, await_scores, call_reward
from quarkrl.rewards.identity import identity_of
from quarkrl.rewards.reward import BATCH_PARAMETERS, Reward
from quarkrl.rewards.validation import checked_scores

# Texts per request, and so per commit: what a crash can cost with a reward that does not call `on_score`.
COMMIT_EVERY = 256


@dataclass
class CacheCounts:
    """How many scores the cache held (`hits`), and how many a reward had to compute (`misses`)."""

    hits: int = 0
    misses: int = 0


class CachedCall(RewardCall):
    """A call of one reward for one batch that takes known scores from a cache.

    Equal texts of the batch are requested once. Scores are committed after each request, those that the reward passes
    to `on_score` immediately. NaN is never stored, so it is retried in the next batch; None is stored.

    Args:
        name, reward, batch: as for `RewardCall`.
        cache: where scores are stored, keyed by the reward's identity and the arguments that it reads.
        counts: counters to increase.
    """

    def __init__(self, name: str, reward: Reward, batch: Batch, cache: ScoreCache, counts: CacheCounts):
        super().__init__(name, reward, batch)
        self._cache, self._counts = cache, counts
        self._identity = identity_of(reward)
        self._scores: dict[bytes, float | None] = {}  # All known scores of the batch, by key.

    def start(self, stop_requested: Event) -> Any:
        """Return the scores of the batch, or an awaitable of them if texts are missing and the reward is async."""
        keys = cache_keys(self.name, self.reward, self.batch)
        self._scores = self._cache.get(self._identity, set(keys))
        self._counts.hits += sum(key in self._scores for key in keys)
        missing = {key: row for row, key in enumerate(keys) if key not in self._scores}
        requests = [
            _Request(list(missing)[start : start + COMMIT_EVERY], list(missing.values())[start : start + COMMIT_EVERY])
            for start in range(0, len(missing), COMMIT_EVERY)
        ]
        for index, request in enumerate(requests):
            answer = self._send(request, stop_requested)
            if inspect.isawaitable(answer):
                return self._await_requests(answer, requests[index:], keys, stop_requested)
            self._store(request.keys, answer)
        return [self._scores[key] for key in keys]

    async def _await_requests(
        self, answer: Awaitable[Any], requests: list["_Request"], keys: list[bytes], stop_requested: Event
    ) -> list[float | None]:
        """Await the first request, which is already sent, then send and await the others."""
        self._store(requests[0].keys, await await_scores(self.name, answer))
        for request in requests[1:]:
            self._store(request.keys, await await_scores(self.name, self._send(request, stop_requested)))
        return [self._scores[key] for key in keys]

    def _send(self, request: "_Request", stop_requested: Event) -> Any:
        if stop_requested.is_set():
            raise CancelledError
        self._counts.misses += len(request.keys)

        def on_score(row: int, score: float | None) -> None:
            self._store(request.keys[row : row + 1], [score])

        return call_reward(self.name, self.reward, self.batch.select(request.rows, on_score))

    def _store(self, keys: Collection[bytes], answer: Any) -> None:
        """Check the scores of these keys, and commit those that are new and not NaN."""
        scores = dict(zip(keys, checked_scores(self.name, answer, len(keys)), strict=True))
        new = {
            key: score
            for key, score in scores.items()
            if key not in self._scores and (score is None or score == score)  # NaN differs from itself.
        }
        self._scores.update(scores)
        if new:
            self._cache.put(self._identity, new)


@dataclass(frozen=True)
class _Request:
    """Distinct texts that are sent to the reward together."""

    keys: list[bytes]
    rows: list[int]  # One row of the batch for each key.


def cache_keys(name: str, reward: Reward, batch: Batch) -> list[bytes]:
    """For each completion, the digest of the arguments that determine its score.

    Raises:
        UserError: `reads` names an argument that does not exist, or a value is not JSON-able.
    """
    arguments = _arguments_read(name, reward, batch)
    try:
        rows = zip(*(batch.columns[argument] for argument in arguments), strict=True)
        return [digest(dict(zip(arguments, row, strict=True))) for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward {name!r} arguments {', '.join(arguments)}: must be JSON-able to be cached ({error}). "
            "Set an attribute `reads` that names only the arguments that the reward needs."
        ) from error


def _arguments_read(name: str, reward: Reward, batch: Batch) -> list[str]:
    declared: Sequence[str] | None = getattr(reward, "reads", None)
    arguments = batch.argument_names(name, reward) if declared is None else declared
    arguments = [argument for argument in arguments if argument not in BATCH_PARAMETERS]
    for argument in arguments:
        if argument not in batch.columns:
            raise UserError(f"reward {name!r} attribute reads {argument!r}: {batch.must_be_a_column(argument)}")
    return arguments
