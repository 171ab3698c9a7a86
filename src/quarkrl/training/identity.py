"""The identity of a run: everything that its result depends on. A resumed run is compared with it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from quarkrl.runs.directory import RunIdentity
from quarkrl.training.config import QuarkConfig, resume_rules


def run_identity(
    config: QuarkConfig,
    model: str,
    reference: str,
    prompts: Sequence[Sequence[int]],
    rewards: list[dict[str, Any]],
    adapter: Any | None,
    streamed: bool = False,
) -> RunIdentity:
    """Return the identity of a run.

    Args:
        config: the options.
        model, reference: digests of the weights that policy and reference start from.
        prompts: token ids of the prompts to explore; of a stream, those of the first iteration.
        rewards: identity of each reward (`Scorer.identity`).
        adapter: the `peft` configuration of an adapter, or None.
        streamed: whether the prompts are streamed.
    """
    facts = {
        "options": config.run_identity(),
        "num_iterations": config.num_iterations,
        "model": model,
        "reference": reference,
        "prompts": ("stream " if streamed else "") + _digest(prompts),
        "rewards": rewards,
        "adapter": None if adapter is None else adapter.to_dict(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return RunIdentity(
        json.loads(json.dumps(facts, default=lambda value: sorted(value) if isinstance(value, set) else str(value))),
        fixed=frozenset(name for name, rule in resume_rules().items() if rule == "fixed"),
    )


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256(np.array([len(ids) for ids in prompts], dtype=np.int64).tobytes())
    for ids in prompts:
        digest.update(np.array(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()
