"""95 % bootstrap confidence intervals over prompts, of all figures at once.

A resample draws prompts with replacement, each with all its completions, because completions of one prompt are not
independent. Every figure is a ratio of two sums over prompts. A resample is therefore a vector with the number of
times each prompt was drawn, and all figures of all resamples are one matrix product. The interval is the percentile
interval (Efron and Tibshirani 1993, chapter 13). It covers the choice of prompts, not the randomness of training.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quarkrl.evaluation.options import RESAMPLES

LEVEL = 0.95
SEED = 0
# Prompts drawn per chunk of resamples: 32 MB of indices.
_DRAWS_AT_A_TIME = 4_000_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Ratio:
    """A figure as a ratio of two sums over prompts.

    Attributes:
        numerators: `(P,)`, the contribution of each prompt.
        denominators: `(P,)`, the weight of each prompt; 0 for a prompt that does not count.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Ratio":
        """Return the mean of the values, NaN excluded: `(P,)` weights prompts equally, `(P, S)` completions."""
        counts = ~np.isnan(values)
        numerators, denominators = np.where(counts, values, 0.0), counts.astype(float)
        if values.ndim == 1:
            return cls(numerators, denominators)
        return cls(numerators.sum(axis=1), denominators.sum(axis=1))

    @property
    def value(self) -> float:
        """The figure; NaN if no prompt counts."""
        total = self.denominators.sum()
        return float(self.numerators.sum() / total) if total else float("nan")


def intervals(ratios: Mapping[str, Ratio], resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Interval]:
    """Compute the 95 % confidence interval of each figure, in the same order.

    Args:
        ratios: figures over the same P prompts.
        resamples: number of bootstrap resamples; 1,000 to 10,000 are usual.
        seed: makes the intervals reproducible. All figures of one call share their resamples.

    Returns:
        The low and the high end; both NaN for fewer than two prompts, or if no prompt counts.
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
        draws = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(draws.ravel(), minlength=size * count).reshape(size, count)  # draws of each prompt
        sums[start : start + size] = times.astype(float) @ columns
    tail = (1 - LEVEL) / 2
    ranges = {}
    for i, name in enumerate(ratios):
        numerators, denominators = sums[:, 2 * i], sums[:, 2 * i + 1]
        valid = denominators > 0  # A resample can miss every prompt that counts.
        values = numerators[valid] / denominators[valid]
        low, high = np.quantile(values, (tail, 1 - tail)) if len(values) else (float("nan"), float("nan"))
        ranges[name] = (float(low), float(high))
    return ranges
