"""Check the scores that reward functions return, their weights, and their names."""

import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

from quarkrl.errors import UserError, shorten
from quarkrl.names import unique_names

# Columns of a pool file that are no rewards.
COLUMNS = ("prompt_ids", "completion_ids", "prompt", "completion")


def checked_scores(name: str, result: Any, n: int) -> list[float | None]:
    """Convert what a reward returned to n floats; None is a missing score and NaN is any non-finite value.

    Args:
        name: the reward's name, for error messages.
        result: a list, tuple, array or tensor.
        n: the number of completions.

    Raises:
        UserError: `result` is not n numbers or None values.
    """
    values = result.tolist() if hasattr(result, "tolist") else result  # NumPy, torch, pandas.
    if not isinstance(values, (list, tuple)):
        raise UserError(f"reward {name!r} returned {_typed(result)}: must be a list of {n} numbers.")
    if len(values) != n:
        raise UserError(f"reward {name!r} returned {len(values)} scores for {n} completions: must be {n} scores.")
    return [_checked_score(name, index, value) for index, value in enumerate(values)]


def _checked_score(name: str, index: int, value: Any) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # A NumPy or torch scalar.
    if not isinstance(value, numbers.Real):
        raise UserError(f"reward {name!r} returned {_typed(value)} at index {index}: must be a number or None.")
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # An integer or a fraction that is too large for a float.
        return math.nan


def _typed(value: Any) -> str:
    return "None" if value is None else f"{shorten(value)} (type {type(value).__name__})"


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Convert the weights of `count` rewards to floats; None is 1 for each.

    Raises:
        UserError: the number of weights is not `count`, or a weight is not a finite number.
    """
    if weights is None:
        return [1.0] * count
    values = [weights] if isinstance(weights, numbers.Real) else list(weights)
    if len(values) != count:
        raise UserError(f"reward_weights {shorten(values)}: must be one number per reward, {count} in all.")
    for value in values:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"reward_weights {value!r}: must be a finite number.")
    return [float(value) for value in values]


def attribute_names(names: Iterable[str]) -> tuple[str, ...]:
    """Make names unique and fit for reward tokens: letters, digits, "_" and "-". A second `x` becomes `x-2`.

    So does a first one that has the name of another column of the pool.
    """
    fit = (re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "reward" for name in names)
    return tuple(unique_names(fit, set(COLUMNS)))
