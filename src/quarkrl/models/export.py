"""Write a trained policy as an ordinary checkpoint, and identify a model by its weights."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.models.conditioning import Conditioning
from quarkrl.models.loading import eos_ids


def save_steered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conditioning: Conditioning,
    directory: Path,
    facts: dict[str, Any],
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint that plain transformers loads and that asks for the best quantile by default.

    Args:
        model: the policy; an adapter is merged into a copy.
        tokenizer: one that puts the best reward token first (`Conditioning.steer_tokenizer`).
        conditioning: the reward tokens, which the checkpoint's generation config suppresses. It stops at the EOS ids of
            training (`loading.eos_ids`).
        directory: where to write; it exists.
        facts: what `quark.json` holds beside the conditioning.
        state_dict: the weights, if they were gathered from several processes; by default those of the model.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    saved_config = copy.deepcopy(model.generation_config)
    saved_cache = model.config.use_cache
    model.generation_config.suppress_tokens = conditioning.all_token_ids
    model.generation_config.eos_token_id = eos_ids(model, tokenizer, conditioning.vocab_size) or None
    model.config.use_cache = True  # Trainer switches it off.
    try:
        model.save_pretrained(directory, state_dict=state_dict)
    finally:
        model.generation_config, model.config.use_cache = saved_config, saved_cache
    tokenizer.save_pretrained(directory)
    conditioning.save(directory, **facts)


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """Identify a model: its name, its commit on the hub (None for a directory), its size, a digest of its weights."""
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
