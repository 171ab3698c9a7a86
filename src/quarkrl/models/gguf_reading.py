"""GGUF files, the format of llama.cpp, read as ordinary models: transformers dequantizes the weights."""

import os
from collections.abc import Mapping
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from quarkrl.errors import UserError

# Values of `tokenizer.ggml.pre` for tokenizers that split numbers into digits, which transformers does not know.
_DIGIT_SPLITTERS = frozenset({"smollm"})


def is_gguf(path: str | os.PathLike) -> bool:
    """Return whether a path names a GGUF file."""
    return str(path).lower().endswith(".gguf")


def locate(path: str | os.PathLike) -> dict[str, Any]:
    """Return the arguments with which the classes of transformers find a GGUF file.

    Raises:
        UserError: there is no such file, or the package `gguf` is missing.
    """
    if not os.path.isfile(path):
        raise UserError(f"model {str(path)!r}: must be a file. Name a GGUF file that exists.")
    if not is_gguf_available():
        raise UserError(f'model {str(path)!r}: a GGUF file needs the extra. Run pip install "quarkrl[gguf]".')
    directory, name = os.path.split(os.path.abspath(path))
    return {"pretrained_model_name_or_path": directory, "gguf_file": name}


def load_gguf_config(path: str | os.PathLike) -> PretrainedConfig:
    """Load the config in a GGUF file.

    Raises:
        UserError: there is no such file, or the package `gguf` is missing.
    """
    config = AutoConfig.from_pretrained(**locate(path))
    if config.model_type == "gpt2":  # transformers reads these two under names that its model does not use.
        config.n_positions, config.n_inner = config.n_ctx, config.feed_forward_length
    return config


def load_gguf_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a GGUF file.

    Raises:
        UserError: there is no such file, or the package `gguf` is missing.
    """
    from transformers.integrations.gguf import read_gguf_metadata

    tokenizer = AutoTokenizer.from_pretrained(**locate(path))
    metadata, _ = read_gguf_metadata(str(path))
    if metadata.get("tokenizer.ggml.pre") in _DIGIT_SPLITTERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    _complete(tokenizer, metadata)
    return tokenizer


def _complete(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any]) -> None:
    """Set what transformers 5.17 does not read. Nothing is set again: that would replace a right post-processor."""
    for name in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and getattr(tokenizer, f"{name}_token_id") != number:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(number)))
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token")
    if adds_bos is not None and tokenizer.add_bos_token != adds_bos:
        tokenizer.add_bos_token = adds_bos
