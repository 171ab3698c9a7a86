"""What `quark.json` says about a run, beside the reward tokens."""

import os
from typing import Any

from quarkrl.algorithm.coefficients import Coefficients
from quarkrl.algorithm.pool import DataPool
from quarkrl.data.prompts import Prompts
from quarkrl.data.scored import ScoredSamples
from quarkrl.models.quark_json import read_quark_json


def run_facts(
    options: dict[str, Any],
    step: int,
    pool: DataPool,
    coefs: Coefficients,
    origin: dict[str, Any],
    best_checkpoint: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Collect the facts that are saved with a run's weights.

    Args:
        options: the options of the run (`QuarkConfig.recorded_options`).
        step: optimizer steps done.
        pool: the samples, quantized.
        coefs: weights of the KL and entropy terms, as they stand.
        origin: what the run was made from (`describe_origin`).
        best_checkpoint: the checkpoint whose weights the run has loaded at its end; its facts replace those of the last
            step. None if the weights are those of the last step.
    """
    facts = {
        "quantile_edges": pool.edges.tolist(),
        "iterations": step / options["steps_per_iteration"],
        "pool_size": len(pool),
        **origin,
        "coefs": {"kl_coef": coefs.kl_coef, "entropy_coef": coefs.entropy_coef},
        "config": options,
    }
    if best_checkpoint:
        best = read_quark_json(best_checkpoint) or {}
        facts |= {name: value for name, value in best.items() if name != "conditioning"}
    return facts


def describe_origin(
    identities: dict[str, dict[str, Any]],
    rewards: Any,
    prompts: Prompts,
    explores: bool,
    scored: ScoredSamples | None,
    sources: tuple[str | None, str | None],
) -> dict[str, Any]:
    """Return what a run was made from: models, rewards, prompts and scored samples.

    Args:
        identities: of the models, by name (`model_identity`): "start", which the policy was at first, and "reference".
        rewards: identity of the rewards (`Scorer.identity`).
        prompts: the prompts to explore, which are texts or chats to the model.
        explores: whether the run explores them.
        scored: the samples that the run started from, if any.
        sources: the names of prompts and scored samples, where they have one.
    """
    described = {"source": sources[0], "count": len(prompts), "reads": "chats" if prompts.are_chats else "texts"}
    if not explores:
        described["explored"] = False
    samples = {"scored_data": {"source": sources[1], "samples": len(scored)}} if scored else {}
    return {**identities, "rewards": rewards, "prompts": described, **samples}
