"""Models and tokenizers from a directory or the hub, and what there is to know of them."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation

from quarkrl.errors import UserError


def context_length(model: PreTrainedModel) -> int:
    """The most tokens the model can read; a large number where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def load_model(path: str | os.PathLike, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A causal language model from a directory or the hub.

    Nothing that is loaded runs code, unless `trust_remote_code`: weights are read from safetensors, never from pickles,
    and neither the model's own classes nor an attention kernel that its config names are imported.

    Args:
        path: where it is.
        trust_remote_code: run the Python code that comes with the model.
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UserError: there is none that can be loaded; in one line.
    """
    given = {**kwargs, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    try:
        _refuse_pickles(Path(path))
        if config := _config(path, trust_remote_code):
            # Its own word for the attention may be a kernel's name on the hub, to be fetched and imported.
            config._attn_implementation = given.pop("attn_implementation", None) or _fastest_attention()
            given["config"] = config
        model, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **given)
        if missing := [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]:
            # transformers would draw them at random, and say so in a table that nobody sees.
            raise UserError(
                f"model {str(path)!r} cannot be loaded: it has no weights for {', '.join(sorted(missing)[:3])}, of "
                f"{len(missing)} missing: want a causal language model, whole"
            )
        return with_fused_gelu(model)
    except UserError:
        raise
    except Exception as error:
        # transformers fails here in a dozen ways, on a damaged config above all; whichever it was, this is no model.
        raise UserError(f"model {str(path)!r} cannot be loaded: {_said(error)}") from error


def _fastest_attention() -> str | None:
    """On a CPU eager is, up to some 500 tokens (docs/performance.md); elsewhere transformers chooses."""
    return None if torch.accelerator.is_available() else "eager"


def _config(path: str | os.PathLike, trust_remote_code: bool) -> PretrainedConfig | None:
    """A model's config; None for an adapter alone, which has none."""
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        return None
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _refuse_pickles(path: Path) -> None:
    """Say what to do where a directory has weights, but only pickled ones."""
    for safe, pickled in (("model", "pytorch_model"), ("adapter_model", "adapter_model")):
        if any(path.glob(f"{pickled}*.bin")) and not any(path.glob(f"{safe}*.safetensors")):
            raise UserError(
                f"model {str(path)!r} cannot be loaded: its weights are pickled ({pickled}.bin), which can run code as "
                "it is read; if you trust it, load it with transformers and save_pretrained(…) it as safetensors"
            )


def with_fused_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """The model with GPT-2's tanh GELU computed by torch's one kernel, not by eight: the same to rounding.

    A quarter of a learning step of a small GPT-2 went into the eight.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def _said(error: Exception) -> str:
    """An exception's first line, with its type where that tells more than the line does (KeyError: 'x')."""
    plain = isinstance(error, OSError | ValueError | ImportError | SafetensorError)
    return first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}"


def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, from a directory or the hub.

    Args:
        path: where it is.
        trust_remote_code: run the Python code that comes with it.

    Raises:
        UserError: there is none; in one line.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
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
