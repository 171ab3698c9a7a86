"""An evaluation on held-out prompts, which shows overfitting and chooses the best checkpoint."""

from collections.abc import Sequence

import numpy as np

from quarkrl.data.prompts import Prompts
from quarkrl.errors import UserError, did_you_mean
from quarkrl.training.config import QuarkConfig
from quarkrl.training.exploration import Sampler, Task

# In the place of an iteration's number, which is always smaller, in the seed of sampling.
_SEED = 2**31 - 1


def held_out_task(prompts: Prompts, sampler: Sampler, args: QuarkConfig) -> Task:
    """Return what an evaluation samples."""
    return Task(
        prompts=prompts,
        rows=[row for row in range(len(prompts)) for _ in range(args.eval_samples_per_prompt)],
        sampling=args.eval_sampling(),
        sampler=sampler,
        seed=(args.seed, _SEED),
        batch_size=args.per_device_eval_batch_size,
    )


def held_out_metrics(figures: dict[str, float], attributes: Sequence[str], prefix: str) -> dict[str, float]:
    """Return the figures of a rollout as metrics of an evaluation, with `reward` added.

    Args:
        figures: by name, among them the mean of each attribute.
        attributes: the rewards that condition; `reward` is their mean.
        prefix: of the metrics' names, such as "eval".
    """
    reward = float(np.mean([figures[name] for name in attributes]))
    return {f"{prefix}_{name}": value for name, value in {"reward": reward, **figures}.items()}


def check_metric(name: str | None, attributes: Sequence[str], terms: Sequence[str]) -> None:
    """Check, before a run starts, that its evaluations have the metric that chooses the best checkpoint.

    Args:
        name: `metric_for_best_model`; None is not checked.
        attributes: the rewards that condition.
        terms: the rewards of which the attributes are sums.

    Raises:
        UserError: no evaluation has this metric.
    """
    shapes = ("completion_length", "eos_share", "unscored")
    metric = (name or "").removeprefix("eval_")
    known = ["reward", *attributes, *(f"{a}_std" for a in attributes), *(f"score.{term}" for term in terms), *shapes]
    # A reward's `log_metric` names any `metric.NAME`.
    if name is not None and metric not in known and not metric.startswith("metric."):
        raise UserError(
            f"metric_for_best_model {name!r}: must be one of {', '.join(dict.fromkeys(known))}, or metric.NAME of a "
            f"reward's log_metric.{did_you_mean(metric, known)}"
        )
