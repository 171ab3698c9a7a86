"""A target such as toxicity<=0.02: the smallest guidance scale γ whose figure meets it, from measured rows.

The search measures an ascending list of scales until one meets the target. It then bisects between that scale and the
one before, because a smaller γ costs less perplexity. It stops where the scales are close. It also stops where their
figures differ by less than half of the confidence interval: further measurements would only follow chance.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quarkrl.errors import UserError, did_you_mean
from quarkrl.evaluation.results import Row

# The scales that a search measures by default; 1 is without guidance.
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_CLOSE = 1.1  # Scales whose ratio is at most this are not bisected.


@dataclass(frozen=True)
class Target:
    """A bound for a figure.

    Attributes:
        text: as the user wrote it.
        metric: name of the figure.
        is_upper: whether the figure must be at most the bound; otherwise it must be at least the bound.
        bound: the bound.
    """

    text: str
    metric: str
    is_upper: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read "METRIC<=VALUE" or "METRIC>=VALUE".

        Raises:
            UserError: the text has another form.
        """
        match = re.fullmatch(r"\s*(.+?)\s*(<=|>=)\s*(\S+)\s*", text)
        try:
            bound = float(match[3]) if match else math.nan
        except ValueError:
            bound = math.nan
        if match is None or not math.isfinite(bound):
            raise UserError(
                f"target {text!r}: must be METRIC<=NUMBER or METRIC>=NUMBER. Write for example 'toxicity<=0.02'."
            )
        return cls(text, match[1], match[2] == "<=", bound)

    def check_metric(self, names: Sequence[str]) -> None:
        """Check that the evaluation has such a figure.

        Raises:
            UserError: it has not.
        """
        if self.metric not in names:
            raise UserError(
                f"target {self.text!r}: must name a figure of this evaluation, which are {', '.join(names)}."
                f"{did_you_mean(self.metric, names)}"
            )

    def miss(self, row: Row) -> float:
        """Return by how much a row misses the target, at most 0 if it meets it; infinite for a missing figure."""
        value = row.figures[self.metric]
        if math.isnan(value):
            return math.inf
        return value - self.bound if self.is_upper else self.bound - value

    def is_met(self, row: Row) -> bool:
        """Return whether a row meets the target."""
        return self.miss(row) <= 0


@dataclass(frozen=True)
class Choice:
    """The outcome of a search.

    Attributes:
        target: the target.
        rows: the measured rows, by ascending γ.
        row: the one with the smallest γ that meets the target; None if none does.
    """

    target: Target
    rows: list[Row]
    row: Row | None

    @property
    def nearest(self) -> Row:
        """The row that misses the target least; of equal ones, that with the smallest γ."""
        return min(self.rows, key=self.target.miss)

    def describe(self) -> str:
        """Return the outcome in a sentence or two."""
        target, highest = self.target.text, self.rows[-1].guidance_scale
        if self.row is None:
            nearest = f"The nearest is γ = {self.nearest.guidance_scale:g}: {self._figures(self.nearest)}."
            return f"target {target}: no γ up to {highest:g} meets it. {nearest}"
        text = f"target {target}: γ = {self.row.guidance_scale:g} meets it: {self._figures(self.row)}."
        low, high = self.row.intervals[self.target.metric]
        edge = high if self.target.is_upper else low
        if (edge > self.target.bound) if self.target.is_upper else (edge < self.target.bound):
            text += f" The 95 % interval reaches {edge:.3g}, which misses it. More --samples make it narrower."
        return text

    def to_json(self) -> dict[str, Any]:
        """Return the outcome for results.json."""
        return {
            "target": self.target.text,
            "guidance_scale": None if self.row is None else self.row.guidance_scale,
            "nearest": self.nearest.guidance_scale,
            "verdict": self.describe(),
        }

    def _figures(self, row: Row) -> str:
        """The figure of the target with half of its interval, and the perplexity beside that of the smallest γ."""
        low, high = row.intervals[self.target.metric]
        text = f"{self.target.metric} {row.figures[self.target.metric]:.4g} ±{(high - low) / 2:.2g}"
        first, perplexity = self.rows[0], row.figures["perplexity"]
        if row is not first:
            text += f" (γ = {first.guidance_scale:g}: {first.figures[self.target.metric]:.4g})"
        if self.target.metric != "perplexity":
            text += f", perplexity {perplexity:.2f}"
            if row is not first:
                text += f" ({100 * (perplexity / first.figures['perplexity'] - 1):+.0f} %)"
        return text


def search(target: Target, measure: Callable[[float], Row], scales: Sequence[float] = SCALES) -> Choice:
    """Find the smallest γ that meets a target.

    Args:
        target: the target.
        measure: returns the row of a scale.
        scales: the scales to measure, until one meets the target.
    """
    rows: list[Row] = []
    for scale in sorted(set(scales)):
        rows.append(measure(scale))
        if target.is_met(rows[-1]):
            break
    chosen = rows[-1] if target.is_met(rows[-1]) else None
    below = rows[-2] if len(rows) > 1 else None
    while chosen and below and _pays(target, below, chosen):
        middle = measure(round((below.guidance_scale + chosen.guidance_scale) / 2, 2))
        rows.append(middle)
        below, chosen = (below, middle) if target.is_met(middle) else (middle, chosen)
    return Choice(target, sorted(rows, key=lambda row: row.guidance_scale), chosen)


def _pays(target: Target, below: Row, above: Row) -> bool:
    """Whether a scale between two others can be told from them."""
    if above.guidance_scale <= _CLOSE * below.guidance_scale:
        return False
    low, high = above.intervals[target.metric]
    difference = target.miss(below) - target.miss(above)
    return bool(difference > (high - low) / 2)
