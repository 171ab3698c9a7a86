"""What an exploration samples: which prompts in which iteration, and the completions with their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quarkrl.errors import UserError


@dataclass(frozen=True)
class Rollout:
    """Sampled and scored completions.

    Attributes:
        rows: for each completion, the row of its prompt.
        completions: token ids, as sampled.
        rewards: `(n, A)`, NaN where there is none.
        seconds_sample, seconds_score: what it took.
        start: which of the whole rollout's completions is the first here.
    """

    rows: list[int]
    completions: list[list[int]]
    rewards: np.ndarray
    seconds_sample: float
    seconds_score: float
    start: int = 0

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
        """Mean and spread of each reward, mean length in tokens, share that ended with EOS, how many have no reward."""
        found: dict[str, float] = {}
        for name, values in zip(attributes, self.rewards[self.scored].T, strict=True):
            found |= {name: float(values.mean()), f"{name}_std": float(values.std())}
        found["completion_length"] = float(np.mean([len(ids) for ids in self.completions]))
        found["eos_share"] = float(np.mean([ids[-1] in end_ids for ids in self.completions]))
        found["unscored"] = len(self.rows) - len(self.scored)
        return found


def prompt_schedule(
    prompt_ids: Sequence[Sequence[int]], iteration: int, count: int | None, samples_per_prompt: int, seed: int
) -> list[int]:
    """The rows of the prompts that an iteration explores, each `samples_per_prompt` times.

    Iterations take `count` prompts each (None: all), in turn through shuffled passes over all. Within an iteration
    they go by length, so that a batch needs little padding. A pure function of its arguments: a resumed run explores
    the same.
    """
    total = len(prompt_ids)
    count = min(count or total, total)
    first, last = iteration * count, (iteration + 1) * count
    passes = range(first // total, (last - 1) // total + 1)
    shuffled = np.concatenate([np.random.default_rng((seed, number)).permutation(total) for number in passes])
    start = first % total
    rows = shuffled[start : start + count]
    lengths = np.array([len(prompt_ids[row]) for row in rows])
    return np.repeat(rows[np.argsort(lengths, kind="stable")], samples_per_prompt).tolist()
