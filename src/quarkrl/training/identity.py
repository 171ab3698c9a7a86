"""The identity of a run: everything that its result depends on. A resumed run is compared with it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from quarkrl.data.chats import is_dated
from quarkrl.data.scored import ScoredSamples
from quarkrl.errors import truncate
from quarkrl.runs.collectives import broadcast
from quarkrl.runs.directory import Differences
from quarkrl.runs.records import recorded_fact
from quarkrl.training.config import QuarkConfig, resume_rules

# Facts that are compared as a whole, and what the user calls them.
_KINDS = {
    "model": "model",
    "reference": "reference model",
    "prompts": "prompts",
    "scored_data": "scored data",
    "adapter": "adapter",
}


@dataclass(frozen=True)
class QuarkIdentity:
    """The identity of a Quark run (`runs.directory.RunIdentity`).

    Attributes:
        facts: the content of run.json: options by name under "options", digests, rewards, versions.
    """

    facts: dict[str, Any]

    def compare(self, saved: Any) -> Differences:
        """Compare with the facts of an earlier run.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: `saved` is not what a run has written.
        """
        now, rules = self.facts, resume_rules()
        before, after = saved["options"], now["options"]
        names = [name for name in before.keys() & after.keys() if before[name] != after[name]]
        options = {name: _change(name, before[name], after[name]) for name in sorted(names)}
        obstacles = [options.pop(name) for name in sorted(names) if rules.get(name) == "fixed"]
        obstacles += [f"other {kind}" for name, kind in _KINDS.items() if saved.get(name) != now.get(name)]
        digests = saved.get("eval_prompts"), now["eval_prompts"]
        if all(digests) and digests[0] != digests[1]:  # None if the run does not keep its best checkpoint.
            obstacles.append("other held-out prompts")
        notes = []
        if [_unchangeable(one) for one in saved["rewards"]] != [_unchangeable(one) for one in now["rewards"]]:
            rewards = _to_short_json(saved["rewards"]), _to_short_json(now["rewards"])
            obstacles.append(f"rewards were {rewards[0]}, are {rewards[1]}")
        elif saved["rewards"] != now["rewards"]:
            notes.append("the source of a reward has changed since")
        for name, version in now["versions"].items():
            if (old := saved["versions"].get(name)) != version:
                notes.append(f"{name} was {old}, is {version}: results are equal to rounding only")
        if (length := saved["num_iterations"]) != now["num_iterations"]:
            lengths = _change("num_iterations", length, now["num_iterations"])
            notes.append(f"{lengths}: the learning rate follows the new length from here on")
        return Differences(options, obstacles, notes)


def run_identity(  # noqa: PLR0913 - all that a result depends on
    config: QuarkConfig,
    model: str,
    reference: str,
    prompts: Sequence[Sequence[int]],
    eval_prompts: Sequence[Sequence[int]] | None,
    rewards: list[dict[str, Any]],
    adapter: Any | None,
    chat_date: datetime | None = None,
    kind_of_prompts: str = "",
    scored: ScoredSamples | None = None,
    is_encoder_decoder: bool = False,
) -> QuarkIdentity:
    """Return the identity of a run.

    Args:
        config: the options.
        model, reference: digests of the weights that policy and reference start from.
        prompts: token ids of the prompts to explore; of a stream, those of the first iteration.
        eval_prompts: token ids of the held-out prompts, which choose the best checkpoint if the run keeps it.
        rewards: identity of each reward (`Scorer.identity`).
        adapter: the `peft` configuration of an adapter, or None.
        chat_date: the date that the chats of the run have (`find_chat_date`).
        kind_of_prompts: "stream", "unexplored", or "" for prompts in memory that the run explores.
        scored: the samples that the run starts from, if any.
        is_encoder_decoder: whether the model has an encoder for the prompt.
    """
    chooses = config.load_best_model_at_end and eval_prompts is not None
    facts = {
        "options": config.run_identity(),
        "num_iterations": config.num_iterations,
        "model": model,
        "is_encoder_decoder": is_encoder_decoder,
        "reference": reference,
        "prompts": f"{kind_of_prompts} {_digest(prompts)}".lstrip(),
        "scored_data": None if scored is None else _digest_samples(scored),
        "eval_prompts": _digest(eval_prompts or ()) if chooses else None,
        "rewards": rewards,
        "adapter": None if adapter is None else adapter.to_dict(),
        "chat_date": None if chat_date is None else chat_date.isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return QuarkIdentity(
        json.loads(json.dumps(facts, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
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


def _digest_samples(samples: ScoredSamples) -> str:
    ids = _digest([*samples.prompts.ids, *samples.completions])
    return hashlib.sha256(ids.encode() + samples.rewards.tobytes()).hexdigest()


def _change(name: str, before: Any, after: Any) -> str:
    return f"{name} was {_to_short_json(before)}, is {_to_short_json(after)}"


def _unchangeable(reward: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a reward's identity that may not change. The source of a plain function may."""
    return {name: reward[name] for name in ("name", "weight")} if "qualname" in reward else {**reward}


def _to_short_json(value: Any) -> str:
    return truncate(json.dumps(value), 60)
