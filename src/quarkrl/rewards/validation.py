"""What a Scorer is given and what its reward functions return, checked: numbers, weights, names."""

import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

from quarkrl.errors import UserError


def checked_scores(name: str, result: Any, n: int) -> list[float | None]:
    listed = result.tolist() if hasattr(result, "tolist") else result  # NumPy, torch, pandas
    if not isinstance(listed, (list, tuple)):
        raise UserError(f"reward {name!r} returned {_shown(result)}: a list of {n} numbers is wanted")
    if len(listed) != n:
        raise UserError(f"reward {name!r} returned {len(listed)} scores for {n} completions: return {n}")
    return [_checked_score(name, index, value) for index, value in enumerate(listed)]


def _checked_score(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a NumPy or torch scalar
    if not isinstance(value, numbers.Real):
        raise UserError(f"reward {name!r} returned {_shown(value)} at index {index}: a number or None is wanted")
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # a whole number or a fraction too large for a float
        return math.nan


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    text = text if len(text) <= 60 else text[:59] + "…"
    return text if value is None else f"{text} (of type {type(value).__name__})"


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    values = [weights] if isinstance(weights, numbers.Real) else list(weights)
    if len(values) != count:
        raise UserError(f"{len(values)} weights are given for {count} rewards: one each is wanted")
    for value in values:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"weight {value!r} is not a finite number")
    return [float(value) for value in values]


def attribute_names(names: Iterable[str]) -> tuple[str, ...]:
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
