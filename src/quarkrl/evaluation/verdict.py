"""What a run has changed, in one sentence: better, worse, or no clear change."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from quarkrl.evaluation.intervals import Interval, Ratio, intervals
from quarkrl.evaluation.results import Row

MAX_PERPLEXITY_RATIO = 1.5  # Beyond this factor, most users notice that the text has suffered.
MIN_LENGTH_RATIO = 0.75  # Below it, part of the gain may be that less is said.
_NEARLY_ALL = 0.98


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


def describe(before: Row, best: Row, worst: Row | None = None, fewer_draws: str = "") -> str:
    """Return the verdict as a sentence, the figures behind it, and what to try if the run falls short of its purpose.

    Args:
        before: the model before training.
        best: the trained model on its best quantile.
        worst: the trained model on its worst quantile, if it has several.
        fewer_draws: if the run drew each completion too often, the options that mend it. The advice then is no more
            training, which would make it worse.
    """
    change, steering = compare(before, best), None if worst is None else compare(worst, best)
    dear = _ratio("perplexity", before, best) > MAX_PERPLEXITY_RATIO
    steers = steering is None or steering.kind == "better"
    faults = ["perplexity rose"] * dear + ["the tokens do not steer"] * (not steers)
    kind = f"{change.kind}, but {' and '.join(faults)}" if change.kind == "better" and faults else change.kind
    parts = [f"{kind}: the reward went from {_in_words(change)} on held-out prompts"]
    if dear:
        start, end = before.figures["perplexity"], best.figures["perplexity"]
        medians = " to ".join(f"{np.nanmedian(row.perplexities):.2f}" for row in (before, best))
        parts.append(f"perplexity went from {start:.2f} to {end:.2f} (medians {medians})")
    if steering is not None and not steers:
        parts.append(f"from the worst to the best quantile it goes from {_in_words(steering)}")
    notes = _notes(before, best, worst) if change.kind == "better" else ""
    return "; ".join(parts) + "." + notes + _advice(before, change, dear, steers, fewer_draws)


def _notes(before: Row, best: Row, worst: Row | None) -> str:
    """What the user may not expect of a better model: short completions, and a worst quantile above the start."""
    notes = ""
    if worst is not None and (change := compare(before, worst)).kind == "better":
        notes += f" The worst quantile is better than before, too ({change.after:.3f})."
    if _ratio("completion length", before, best) < MIN_LENGTH_RATIO:
        lengths = " to ".join(f"{row.figures['completion length']:.1f}" for row in (before, best))
        notes += (
            f" Completions are shorter, {lengths} tokens. If that is not wanted, score a rate instead of a count, or "
            "set --min_completion_length."
        )
    return notes


def _in_words(change: Change) -> str:
    low, high = change.interval
    difference = f"change {change.after - change.before:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    return f"{change.before:.3f} to {change.after:.3f} ({difference})"


def _ratio(figure: str, before: Row, after: Row) -> float:
    """The factor by which a figure rose; NaN if it is not known."""
    start = before.figures[figure]
    return after.figures[figure] / start if start else float("nan")


def _advice(before: Row, change: Change, dear: bool, steers: bool, fewer_draws: str) -> str:
    if change.kind == "better" and steers and not dear:
        return ""
    top = float(np.mean(before.rewards == np.nanmax(before.rewards)))
    if change.kind == "no clear change" and top > _NEARLY_ALL:
        return (
            f" {top:.0%} of the completions had the highest reward before training, so little was left to gain. Try "
            "prompts that provoke what is unwanted, or a finer reward."
        )
    if fewer_draws:
        return f" Each completion was drawn too often: try {fewer_draws}."
    if change.kind == "worse" or dear:
        check = " Check by quarkrl score that better texts get higher rewards." if change.kind == "worse" else ""
        return f" Try a higher --kl_coef or a lower --learning_rate.{check}"
    if change.kind == "better":
        return " Try more --num_iterations, so that the tokens learn what sets them apart."
    return (
        " Try more --num_iterations, a higher --learning_rate or a lower --kl_coef; more --held_out for a surer answer."
    )


def _means(row: Row) -> np.ndarray:
    """`(P,)`, the mean reward of each prompt; NaN if none of its completions has one."""
    counts = (~np.isnan(row.rewards)).sum(axis=1)
    return np.where(counts, np.nansum(row.rewards, axis=1) / np.maximum(counts, 1), np.nan)
