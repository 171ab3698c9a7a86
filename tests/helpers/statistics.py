"""Statistics of counts, to test that random draws follow their distribution."""

from __future__ import annotations

import numpy as np


def chi_square(counts: np.ndarray, shares: np.ndarray | None = None) -> float:
    """Return Pearson's chi-square of counts with expected shares, which are equal by default."""
    expected = counts.sum() * (1 / len(counts) if shares is None else shares)
    return float(((counts - expected) ** 2 / expected).sum())
