"""What a run has changed, in one sentence: better, worse, or no clear change."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from quarkrl.evaluation.intervals import Interval, Ratio, intervals
from quarkrl.evaluation.results import Row

# Beyond this factor, the text has suffered more than the reward is worth to most users.
MAX_PERPLEXITY_RATIO = 2.0


@dataclass(frozen=True)
class Change:
    """The mean reward of two rows, and the interval of its change.

    Attributes:
        before, after: mean rewards.
        interval: of after - before: 95 %, by bootstrap over prompts. Each prompt is compared with itself.
    """

    before: float
    after: float
    interval: Interval

    @property
    def kind(self) -> Literal["better", "worse", "no clear change"]:
        """The verdict in a word: whether the interval lies above 0, below it, or on both sides."""
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no clear change"


def compare(before: Row, after: Row) -> Change:
    """Compare the rewards of two rows on the same prompts; completions without a reward do not count."""
    change = _means(after) - _means(before)
    (interval,) = intervals({"change": Ratio.of(change)}).values()
    return Change(before.figures["reward"], after.figures["reward"], interval)


def describe(change: Change, before: Row, after: Row) -> str:
    """Return the verdict as a sentence, and what to try if the run has not done what it should."""
    low, high = change.interval
    moved = f"the reward went from {change.before:.3f} to {change.after:.3f} on held-out prompts"
    moved += f" (change {change.after - change.before:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"
    remedy = _remedy(change, before, after)
    return f"{change.kind}: {moved}." + (f" {remedy}" if remedy else "")


def _remedy(change: Change, before: Row, after: Row) -> str:
    if change.kind == "worse":
        return (
            "Try a lower --learning_rate or a higher --kl_coef. Check by quarkrl score that better texts get higher "
            "rewards."
        )
    perplexity = after.figures["perplexity"] / before.figures["perplexity"]
    if change.kind == "better":
        if perplexity > MAX_PERPLEXITY_RATIO:
            return (
                f"But perplexity is {perplexity:.1f} times as high: try a higher --kl_coef or a lower --learning_rate."
            )
        return ""
    top = float(np.mean(before.rewards == np.nanmax(before.rewards)))
    if top > _NEARLY_ALL:
        return (
            f"{top:.0%} of the completions had the highest reward before training, so little was left to gain. Try "
            "prompts that provoke what is unwanted, or a finer reward."
        )
    return (
        "Try more --num_iterations, a higher --learning_rate or a lower --kl_coef; more --held_out for a surer answer."
    )


_NEARLY_ALL = 0.98


def _means(row: Row) -> np.ndarray:
    """`(P,)`, the mean reward of each prompt; NaN if none of its completions has one."""
    counts = (~np.isnan(row.rewards)).sum(axis=1)
    return np.where(counts, np.nansum(row.rewards, axis=1) / np.maximum(counts, 1), np.nan)
