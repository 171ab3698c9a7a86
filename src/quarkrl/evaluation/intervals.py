"""How sure a figure is: 95 % bootstrap intervals over prompts, of all figures at once.

Prompts are drawn anew with replacement, each with all its completions: completions of one prompt are no independent
evidence. Every metric here is a ratio of two sums over prompts, so a resample is a vector of how often each prompt was
drawn, and all metrics of all resamples are one matrix product. The interval is the percentile one (Efron and
Tibshirani 1993, chapter 13). It knows of the prompts' chance, not of the training run's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
# Drawn numbers held at a time: 32 MB of them.
_DRAWS_AT_A_TIME = 4_000_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """A figure as a ratio of two sums over prompts.

    Attributes:
        numerators: `(P,)`, what each prompt adds.
        denominators: `(P,)`, for how much it counts; 0 for a prompt that is left out.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Ratio":
        """The mean of values, NaN left out: `(P,)` weighs prompts alike, `(P, S)` completions."""
        there = ~np.isnan(values)
        numerators, denominators = np.where(there, values, 0.0), there.astype(float)
        if values.ndim == 1:
            return cls(numerators, denominators)
        return cls(numerators.sum(axis=1), denominators.sum(axis=1))

    @property
    def value(self) -> float:
        """The figure; NaN where nothing counts."""
        total = self.denominators.sum()
        return float(self.numerators.sum() / total) if total else float("nan")


def intervals(ratios: Mapping[str, Ratio], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """The 95 % interval of each figure, in the order given.

    Args:
        ratios: figures over the same P prompts.
        resamples: how often to draw the prompts anew; 1,000 to 10,000 are usual.
        seed: the same gives the same intervals. Figures of one call share their draws.

    Returns:
        Low and high end; both NaN where there are fewer than two prompts, or none that counts.
    """
    if not ratios:
        return {}
    columns = np.column_stack([part for r in ratios.values() for part in (r.numerators, r.denominators)])  # (P, 2 M)
    count = len(columns)
    if count < 2:
        return {name: (float("nan"), float("nan")) for name in ratios}
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, columns.shape[1]))
    step = max(1, _DRAWS_AT_A_TIME // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)  # how often each prompt
        sums[start : start + size] = times.astype(float) @ columns
    tail = (1 - LEVEL) / 2
    found = {}
    for i, name in enumerate(ratios):
        numerators, denominators = sums[:, 2 * i], sums[:, 2 * i + 1]
        counts = denominators > 0  # Few prompts count, and a resample can miss them all.
        values = numerators[counts] / denominators[counts]
        low, high = np.quantile(values, (tail, 1 - tail)) if len(values) else (float("nan"), float("nan"))
        found[name] = (float(low), float(high))
    return found
