"""Load models and tokenizers from a directory or the hub, without running code that comes with them."""

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

from quarkrl.errors import UserError, one_line


def load_model(path: str | os.PathLike, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a causal language model from a directory or the hub.

    No code is run unless `trust_remote_code`. Weights are read from safetensors, never from pickles. The model's own
    classes, and an attention kernel that its config names, are not imported.

    Args:
        path: a directory, or a name on the hub.
        trust_remote_code: run the Python code that comes with the model.
        kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UserError: no causal language model can be loaded from there.
    """
    options = {**kwargs, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    try:
        _refuse_pickles(Path(path))
        if config := _load_config(path, trust_remote_code):
            # A config can name an attention kernel of the hub, which transformers would fetch and import.
            config._attn_implementation = options.pop("attn_implementation", None) or _default_attention()
            options["config"] = config
        model, loading_info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
        missing_keys = [*loading_info["missing_keys"], *(key[0] for key in loading_info["mismatched_keys"])]
        if missing_keys:  # transformers would initialise them at random.
            raise UserError(
                f"model {str(path)!r} cannot be loaded: it has no weights for {len(missing_keys)} tensors, among them "
                f"{', '.join(sorted(missing_keys)[:3])}. Name a complete causal language model."
            )
        return with_fused_gelu(model)
    except UserError:
        raise
    except Exception as error:
        # transformers raises a dozen types of exception for a damaged model, above all for a damaged config.
        raise UserError(
            f"model {str(path)!r} cannot be loaded: {_describe(error)}. Name a causal language model, by its directory "
            "or its name on the hub."
        ) from error


def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a directory or the hub.

    Args:
        path: a directory, or a name on the hub.
        trust_remote_code: run the Python code that comes with the tokenizer.

    Raises:
        UserError: no tokenizer can be loaded from there.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        # transformers raises a dozen types of exception here, the tokenizers library a bare Exception.
        raise UserError(
            f"model {str(path)!r} has no tokenizer that can be loaded: {one_line(error)}. Save one in the same place."
        ) from error
    # For a directory without one, transformers returns an empty tokenizer of the model's type.
    files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if os.path.isdir(path) and not any(os.path.exists(os.path.join(path, name)) for name in files):
        raise UserError(f"model {str(path)!r} has no tokenizer ({', '.join(files)}). Save one in the same place.")
    return tokenizer


def context_length(model: PreTrainedModel) -> int:
    """The number of tokens that a model can read; 2**31 where its config sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> list[int]:
    """The ids that end a completion: those of the model's generation config, and the tokenizer's EOS.

    transformers' Trainer writes the tokenizer's EOS into the generation config, and vLLM stops at both.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        vocab_size: ids from here on are left out: the default of a config can lie outside the vocabulary.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list | tuple) else [configured]
    ids = dict.fromkeys(i for i in (*configured, tokenizer.eos_token_id) if i is not None)
    return [i for i in ids if vocab_size is None or i < vocab_size]


def with_fused_gelu(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with GPT-2's tanh GELU replaced, in place, by PyTorch's, which is equal up to rounding.

    PyTorch's is one kernel in place of eight, which took a quarter of the time of a learning step of a small GPT-2.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def _default_attention() -> str | None:
    """On a CPU eager, the fastest up to some 500 tokens (docs/performance.md); elsewhere transformers' choice."""
    return None if torch.accelerator.is_available() else "eager"


def _load_config(path: str | os.PathLike, trust_remote_code: bool) -> PretrainedConfig | None:
    """The config of a model; None for a directory that holds only an adapter."""
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        return None
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _refuse_pickles(path: Path) -> None:
    """Raise if a directory has pickled weights and no others."""
    for safe, pickled in (("model", "pytorch_model"), ("adapter_model", "adapter_model")):
        if any(path.glob(f"{pickled}*.bin")) and not any(path.glob(f"{safe}*.safetensors")):
            raise UserError(
                f"model {str(path)!r} cannot be loaded: its weights are pickled ({pickled}.bin), and reading a pickle "
                "can run code. If you trust the model, load it with transformers and call save_pretrained, which "
                "writes safetensors."
            )


def _describe(error: Exception) -> str:
    """The first line of an exception's message, with the type where the line alone says little (KeyError: 'x')."""
    is_clear = isinstance(error, OSError | ValueError | ImportError | SafetensorError)
    return one_line(error) if is_clear else f"{type(error).__name__}: {one_line(error)}"
