"""Held-out prompts as a guard against overfitting: what a run is judged by."""

from collections.abc import Sequence

import numpy as np

from quarkrl.errors import UserError


def held_out_metrics(figures: dict[str, float], attributes: Sequence[str], prefix: str) -> dict[str, float]:
    """A rollout's figures as metrics of an evaluation; where several rewards condition, `reward` is their mean."""
    reward = float(np.mean([figures[name] for name in attributes]))
    return {f"{prefix}_{name}": value for name, value in {"reward": reward, **figures}.items()}


def check_metric(name: str | None, attributes: Sequence[str], terms: Sequence[str]) -> None:
    """See that an evaluation will have the metric a run is to be judged by, before the run begins.

    Args:
        name: `metric_for_best_model`; None is none.
        attributes: the rewards that condition.
        terms: the rewards they are made of.

    Raises:
        UserError: it will not.
    """
    shapes = ("completion_length", "eos_share", "unscored")
    known = ["reward", *attributes, *(f"{a}_std" for a in attributes), *(f"score.{term}" for term in terms), *shapes]
    if name is not None and name.removeprefix("eval_") not in known:
        raise UserError(f"metric_for_best_model {name!r}: want one of {', '.join(dict.fromkeys(known))}")
