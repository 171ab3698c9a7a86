"""What `quark.json` says about a run, beside the reward tokens."""

import os
from typing import Any

from quarkrl.algorithm.coefficients import Coefficients
from quarkrl.algorithm.pool import DataPool
from quarkrl.models.quark_json import read_quark_json


def run_facts(  # noqa: PLR0913 - the facts
    options: dict[str, Any],
    step: int,
    pool: DataPool,
    coefs: Coefficients,
    rewards: Any,
    identities: dict[str, dict[str, Any]],
    best_checkpoint: str | os.PathLike | None = None,
    prompts: dict[str, Any] | None = None,
    scored_data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect the facts that are saved with a run's weights.

    Args:
        options: the options of the run (`QuarkConfig.recorded_options`).
        step: optimizer steps done.
        pool: the samples, quantized.
        coefs: weights of the KL and entropy terms, as they stand.
        rewards: identity of the rewards (`Scorer.identity`).
        identities: of the models, by name (`model_identity`): "start", which the policy was at first, and "reference".
        best_checkpoint: the checkpoint whose weights the run has loaded at its end; its facts replace those of the last
            step. None if the weights are those of the last step.
        prompts: name and number of the prompts to explore, and whether they are texts or chats to the model.
        scored_data: name and number of the samples that the run started from, if any.
    """
    facts = {
        "quantile_edges": pool.edges.tolist(),
        "iterations": step / options["steps_per_iteration"],
        "pool_size": len(pool),
        **identities,
        "rewards": rewards,
        "prompts": prompts,
        **({"scored_data": scored_data} if scored_data else {}),
        "coefs": {"kl_coef": coefs.kl_coef, "entropy_coef": coefs.entropy_coef},
        "config": options,
    }
    if best_checkpoint:
        best = read_quark_json(best_checkpoint) or {}
        facts |= {name: value for name, value in best.items() if name != "conditioning"}
    return facts
