"""Held-out prompts as a guard against overfitting: what a run is judged by, and what is said of its best checkpoint."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from quarkrl.conditioning import load_facts
from quarkrl.errors import UserError

if TYPE_CHECKING:
    from quarkrl.trainer import QuarkTrainer


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


def facts_of(trainer: "QuarkTrainer") -> dict[str, Any]:
    """What belongs with the weights: quantile edges, options, and who scored and who was the reference."""
    args = trainer.args
    return {
        "quantile_edges": trainer.pool.edges.tolist(),
        "iterations": trainer.state.global_step / args.steps_per_iteration,
        "pool_size": len(trainer.pool),
        "reference": trainer.reference_identity,
        "rewards": trainer.scorer.identity,
        "coefs": {"kl_coef": trainer.coefs.kl_coef, "entropy_coef": trainer.coefs.entropy_coef},
        "config": {name: getattr(args, name) for name in (*args.__annotations__, "seed", "bf16", "fp16")},
    } | _best_facts(trainer)


def _best_facts(trainer: "QuarkTrainer") -> dict[str, Any]:
    """The facts of the best checkpoint, once a run has ended by loading it; nothing for any other run."""
    best = trainer.state.best_model_checkpoint
    if trainer.is_in_train or not (trainer.args.load_best_model_at_end and best):
        return {}
    return {name: value for name, value in (load_facts(best) or {}).items() if name != "conditioning"}
