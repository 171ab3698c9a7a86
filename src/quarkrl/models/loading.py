"""Load models and tokenizers from a directory, a GGUF file or the hub, without running code that comes with them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.utils import is_bitsandbytes_available

from quarkrl.builtin import near_builtin
from quarkrl.errors import UserError, one_line
from quarkrl.hub_access import only_cache_if_unreachable, why_unreachable
from quarkrl.models.adapters import (
    CONFIG_FILE,
    find_adapter,
    load_weights,
    merge,
    read_adapter,
    rename,
    saved_rows,
)
from quarkrl.models.chat_template import end_of_turn_id
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.encoder_decoder import decoder_start_ids, is_encoder_decoder
from quarkrl.models.gguf_reading import is_gguf, load_gguf_config, load_gguf_tokenizer, locate
from quarkrl.models.quark_json import read_quark_json, start_name
from quarkrl.names import is_missing_path

# All files of a model in one folder, and no pickles. "consolidated" are Mistral's weights in another format.
_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.codes", "*.tiktoken", "*.py", "*.safetensors"]
_OTHER_FILES = ["*/*", "consolidated*"]


def download(name: str, revision: str | None) -> Path:
    """Return the directory of a model's files, from the hub, or from its cache if the hub cannot be reached.

    Args:
        name: on the hub.
        revision: a commit, branch or tag; None is the main branch.
    """
    return Path(
        huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_OTHER_FILES)
    )


def locate_revision(path: str | os.PathLike, revision: str | None) -> str | os.PathLike:
    """Return the directory of a model's files at a revision; `path` itself if it is local, or without a revision.

    Raises:
        UserError: the hub has no such model or revision, or cannot be reached.
    """
    if revision is None or os.path.exists(path):
        return path
    with _report_failures(path):
        return download(str(path), revision)


def load_model(
    path: str | os.PathLike,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "float32",
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal or encoder–decoder language model from a directory, a GGUF file or the hub.

    A saved adapter is merged into its base model. The weights of a GGUF file are dequantized. No code is run unless
    `trust_remote_code`. Weights are read from safetensors, never from pickles. The model's own classes, and an
    attention kernel that its config names, are not imported.

    Args:
        path: a directory, a file that ends in .gguf, or a name on the hub.
        trust_remote_code: run the Python code that comes with the model.
        dtype: of the weights, whatever the checkpoint was saved in; "auto" keeps the checkpoint's.
        kwargs: for `from_pretrained` of transformers; `load_in_4bit` loads it in 4 bits, as QLoRA does.

    Raises:
        UserError: no such model can be loaded from there.
    """
    options = {**kwargs, "dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    if kwargs.pop("load_in_4bit", False):
        kwargs["quantization_config"] = options["quantization_config"] = quantization_of_4_bits()
    options.pop("load_in_4bit", None)
    with _report_failures(path):
        _refuse_pickles(Path(path))
        if is_gguf(path):
            return _load_gguf(path, options)
        if directory := find_adapter(path):
            model = merge(_load_adapted(path, directory, trust_remote_code, {**kwargs, "dtype": dtype}))
            rename(model, str(path))
            return model
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return with_fused_gelu(_load_weights(path, config, options, pretrained_model_name_or_path=path))


def _load_gguf(path: str | os.PathLike, options: dict[str, Any]) -> PreTrainedModel:
    """The model in a GGUF file, dequantized."""
    if "quantization_config" in options:
        raise UserError("load_in_4bit True: must be False for a GGUF file. Remove --load_in_4bit.")
    options["quantization_config"] = GgufConfig(dequantize=True)
    model = _load_weights(path, load_gguf_config(path), options, **locate(path))
    vars(model.config).pop("_model_name_or_path", None)  # The title that the file gives its model.
    rename(model, str(path))
    return with_fused_gelu(model)


def _load_weights(
    path: str | os.PathLike, config: PretrainedConfig, options: dict[str, Any], **source: Any
) -> PreTrainedModel:
    """A model with all of its weights. `source` says where transformers reads them, `path` names it in errors."""
    # A config can name an attention kernel of the hub, which transformers would fetch and import.
    config._attn_implementation = options.pop("attn_implementation", None) or _default_attention()
    options["config"] = config
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, loading_info = auto_class.from_pretrained(**source, output_loading_info=True, **options)
    missing_keys = [*loading_info["missing_keys"], *(key[0] for key in loading_info["mismatched_keys"])]
    if missing_keys:  # transformers would initialise them at random.
        raise UserError(
            f"model {str(path)!r} cannot be loaded: it has no weights for {len(missing_keys)} tensors, among them "
            f"{', '.join(sorted(missing_keys)[:3])}. Name a complete language model."
        )
    return model


@contextmanager
def _report_failures(path: str | os.PathLike) -> Iterator[None]:
    """Raise a UserError for any exception within the context, in which an unreachable hub is not asked."""
    _refuse_misspelt(str(path))
    try:
        with only_cache_if_unreachable(path):
            yield
    except UserError:
        raise
    except Exception as error:
        _report_unreachable_hub(str(path), error)
        if is_missing_path(str(path)):
            text = f"model {str(path)!r}: no such directory. Name an existing one, or a model on the hub."
            raise UserError(text) from error
        # transformers and peft raise a dozen types of exception for a damaged model, above all for a damaged config.
        raise UserError(
            f"model {str(path)!r} cannot be loaded: {_describe(error)}. Name a language model, by its directory "
            "or its name on the hub."
        ) from error


def _refuse_misspelt(path: str) -> None:
    if hint := near_builtin(path):
        raise UserError(f"model {path!r}: must be an existing directory or file, builtin, or a name on the hub.{hint}")


def _report_unreachable_hub(path: str, error: BaseException) -> None:
    """Raise a UserError if the cause of an error is that the hub is unreachable and its cache lacks a file."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and not is_missing_path(path) and (reason := why_unreachable()):
        raise UserError(
            f"model {path!r}: must be a local directory, builtin, or a model in the hub's cache, because the hub "
            f"cannot be reached ({reason}). Set one of these, or connect to the network."
        ) from error


def quantization_of_4_bits() -> Any:
    """Return the configuration of 4-bit weights: NF4 with double quantization (QLoRA, arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise UserError('load_in_4bit True: needs bitsandbytes. Run `pip install "quarkrl[qlora]"`.')
    compute_dtype = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_adapted(path: str | os.PathLike, trust_remote_code: bool = False, **kwargs: Any) -> Any | None:
    """Load a saved adapter on its base model, not merged; None if `path` is no adapter.

    Args:
        path, trust_remote_code, kwargs: as in `load_model`.

    Raises:
        UserError: the adapter or its base model cannot be loaded.
    """
    with _report_failures(path):
        directory = find_adapter(path)
        return None if directory is None else _load_adapted(path, directory, trust_remote_code, kwargs)


def _load_adapted(path: Any, directory: Path, trust_remote_code: bool, kwargs: dict[str, Any]) -> Any:
    """The base model of a saved adapter, with the adapter on it and the rows of reward tokens."""
    config = read_adapter(directory)
    base = _base_name(path, config)
    start = (read_quark_json(path) or {}).get("start")
    if isinstance(start, dict) and start.get("load_in_4bit"):
        kwargs = {**kwargs, "load_in_4bit": True}  # Weights of other precision would give other logits.
    try:
        model = load_model(base, trust_remote_code, **kwargs)
    except UserError as error:
        raise UserError(f"adapter {str(path)!r}: its base {error}") from error
    if conditioning := Conditioning.load(path):
        options = (read_quark_json(path) or {}).get("config")
        conditioning.add_rows(model, options.get("seed", 0) if isinstance(options, dict) else 0)
    rows = saved_rows(directory, model)
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)  # The adapter holds their values.
    return load_weights(model, directory, config)


def _base_name(path: Any, config: Any) -> str:
    """The base model of a saved adapter: what its run started from, or what its own configuration names."""
    name = start_name(path) or config.base_model_name_or_path
    if not name or os.path.realpath(name) == os.path.realpath(path):
        raise UserError(
            f"adapter {str(path)!r}: must name its base model. Set base_model_name_or_path in {CONFIG_FILE}."
        )
    return name


def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a directory, a GGUF file or the hub.

    Args:
        path: a directory, a file that ends in .gguf, or a name on the hub.
        trust_remote_code: run the Python code that comes with the tokenizer.

    Raises:
        UserError: no tokenizer can be loaded from there.
    """
    if is_gguf(path):
        with _report_failures(path):
            return load_gguf_tokenizer(path)
    _refuse_misspelt(str(path))
    try:
        with only_cache_if_unreachable(path):
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        if directory := find_adapter(path):  # An adapter without a tokenizer has that of its base.
            with _report_failures(path):
                base = _base_name(path, read_adapter(directory))
            return load_tokenizer(base, trust_remote_code)
        _report_unreachable_hub(str(path), error)
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


def longest_prompt(model: PreTrainedModel, completion_length: int) -> int:
    """The most tokens of a prompt, prefix included, that leave room for a completion; negative or 0 if none do.

    An encoder–decoder model reads each of the two on its own.
    """
    limit = context_length(model)
    if not is_encoder_decoder(model):
        return limit - completion_length
    return limit if completion_length + len(decoder_start_ids(model)) <= limit else 0


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> list[int]:
    """The ids that end a completion: those of the generation config, the tokenizer's EOS, and the end of a turn.

    transformers' Trainer writes the tokenizer's EOS into the generation config, and vLLM stops at both.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        vocab_size: ids from here on are left out: the default of a config can lie outside the vocabulary.
    """
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list | tuple) else [configured]
    ids = dict.fromkeys(i for i in (*configured, tokenizer.eos_token_id, end_of_turn_id(tokenizer)) if i is not None)
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
