"""Models and tokenizers from a directory or the hub, and what there is to know of them."""

import os
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from quarkrl.errors import UserError


def context_length(model: PreTrainedModel) -> int:
    """The most tokens the model can read; a large number where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def load_model(path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A causal language model from a directory or the hub.

    Raises:
        UserError: there is none; in one line.
    """
    try:
        return with_fused_gelu(AutoModelForCausalLM.from_pretrained(path, **kwargs))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model {str(path)!r} cannot be loaded: {first_line(error)}") from error


def with_fused_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """The model with GPT-2's tanh GELU computed by torch's one kernel, not by eight: the same to rounding.

    A quarter of a learning step of a small GPT-2 went into the eight.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from a directory or the hub.

    Raises:
        UserError: there is none; in one line.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        # transformers fails here in a dozen ways (OSError, ValueError, TypeError, the tokenizers library's bare
        # Exception); whichever it was, the model has no tokenizer that can be used.
        raise UserError(
            f"model {str(path)!r} has no tokenizer that can be loaded ({first_line(error)}); save one beside it"
        ) from error
    # Where a directory holds none, transformers makes an empty one of the model's kind.
    files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in files):
        raise UserError(f"model {str(path)!r} has no tokenizer ({', '.join(files)}); save one beside it")
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a completion: the model's generation config knows best, then the tokenizer."""
    known = getattr(model.generation_config, "eos_token_id", None)
    known = tokenizer.eos_token_id if known is None else known
    if known is None:
        return []
    return [known] if isinstance(known, int) else list(known)
