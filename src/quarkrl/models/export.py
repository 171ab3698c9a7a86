"""A trained policy as an ordinary checkpoint, what is said of it there, and which model its reference is."""

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.models.conditioning import Conditioning, load_facts

if TYPE_CHECKING:
    from quarkrl.training.trainer import QuarkTrainer


def save_steered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conditioning: Conditioning,
    directory: Path,
    facts: dict[str, Any],
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint that plain transformers loads and that is steered by default.

    Args:
        model: the policy; an adapter is merged into a copy.
        tokenizer: one that puts the best reward token first (`Conditioning.steered`).
        conditioning: its reward tokens, which the generation config suppresses.
        directory: where to.
        facts: what `quark.json` says beside the conditioning.
        state_dict: the weights, where they were gathered from several processes.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    saved_config = copy.deepcopy(model.generation_config)
    saved_cache = model.config.use_cache
    model.generation_config.suppress_tokens = [i for row in conditioning.token_ids for i in row]
    model.config.use_cache = True  # Off while training.
    try:
        model.save_pretrained(directory, state_dict=state_dict)
    finally:
        model.generation_config, model.config.use_cache = saved_config, saved_cache
    tokenizer.save_pretrained(directory)
    conditioning.save(directory, **facts)


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


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """Which model this is: its name, the hub's commit if it has one, its size, and a digest of its weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "name": getattr(model.config, "_name_or_path", "") or None,
        "revision": getattr(model.config, "_commit_hash", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": digest.hexdigest(),
    }
