"""The identity of a run: everything that its result depends on. A resumed run is compared with it."""

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from quarkrl.data.chats import is_dated
from quarkrl.runs.collectives import broadcast
from quarkrl.runs.directory import RunIdentity, recorded_fact
from quarkrl.training.config import QuarkConfig, resume_rules


def run_identity(
    config: QuarkConfig,
    model: str,
    reference: str,
    prompts: Sequence[Sequence[int]],
    rewards: list[dict[str, Any]],
    adapter: Any | None,
    chat_date: datetime | None = None,
    streamed: bool = False,
) -> RunIdentity:
    """Return the identity of a run.

    Args:
        config: the options.
        model, reference: digests of the weights that policy and reference start from.
        prompts: token ids of the prompts to explore; of a stream, those of the first iteration.
        rewards: identity of each reward (`Scorer.identity`).
        adapter: the `peft` configuration of an adapter, or None.
        chat_date: the date that the chats of the run have (`find_chat_date`).
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
        "chat_date": None if chat_date is None else chat_date.isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return RunIdentity(
        json.loads(json.dumps(facts, default=lambda value: sorted(value) if isinstance(value, set) else str(value))),
        fixed=frozenset(name for name, rule in resume_rules().items() if rule == "fixed"),
    )


def find_chat_date(tokenizer: Any, directory: Path, world_size: int) -> datetime | None:
    """Return the date and time that the chats of a run have if its chat template writes the current ones.

    A run has one date, also if it is resumed on another day or if its processes start around midnight.

    Args:
        tokenizer: the tokenizer of the run.
        directory: of the run. The date of the run that is there is used again.
        world_size: the number of processes.

    Returns:
        The date, or None for a chat template without date.
    """
    if not is_dated(tokenizer):
        return None
    recorded = recorded_fact(directory, "chat_date")
    date = datetime.fromisoformat(recorded) if recorded else datetime.now().replace(microsecond=0)
    return broadcast(date, world_size)


def chat_date_note(date: datetime | None, prompts: Sequence[Any]) -> str | None:
    """Return a line for the user if the prompts contain chats that have the date of the run."""
    if date is None or all(isinstance(prompt, str) for prompt in prompts):
        return None
    return (
        f"the chat template writes the current date: the prompts of this run have {date:%Y-%m-%d}, also when it is "
        "resumed; final/ writes the date of its use"
    )


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256(np.array([len(ids) for ids in prompts], dtype=np.int64).tobytes())
    for ids in prompts:
        digest.update(np.array(ids, dtype=np.int64).tobytes())
    return digest.hexdigest()
