"""Write a trained policy as an ordinary checkpoint, and identify a model by its weights."""

import copy
import hashlib
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from quarkrl.errors import UserError, one_line
from quarkrl.models.adapters import hold_output_rows, merge
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.gguf_writing import write_gguf
from quarkrl.models.loading import eos_ids, load_adapted, load_model, load_tokenizer
from quarkrl.models.model_card import write_model_card
from quarkrl.models.quark_json import read_quark_json
from quarkrl.storage.atomic import atomic_directory
from quarkrl.storage.json import nan_to_null


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
        model = merge(copy.deepcopy(model))
    _save_model(model, tokenizer, conditioning, directory, state_dict)
    conditioning.save(directory, **facts)
    write_model_card(directory)


def _save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conditioning: Conditioning,
    directory: Path,
    state_dict: dict[str, torch.Tensor] | None,
) -> None:
    """Write what transformers reads of a checkpoint."""
    saved_config = copy.deepcopy(model.generation_config)
    saved_cache = model.config.use_cache
    model.generation_config.suppress_tokens = conditioning.new_token_ids or None
    model.generation_config.eos_token_id = eos_ids(model, tokenizer, conditioning.vocab_size) or None
    model.config.use_cache = True  # Trainer switches it off.
    try:
        model.save_pretrained(directory, state_dict=state_dict)
    finally:
        model.generation_config, model.config.use_cache = saved_config, saved_cache
    tokenizer.save_pretrained(directory)


def export_merged(path: str | os.PathLike, directory: Path, **load_options: Any) -> None:
    """Write a trained model as an ordinary checkpoint, as `final/` is; an adapter is merged.

    Args:
        path: `final/` of a run, a checkpoint, or a name on the hub.
        directory: where to write.
        load_options: for `load_model`.

    Raises:
        UserError: Quark did not train the model, or it cannot be loaded or written.
    """
    conditioning, facts = _conditioning_and_facts(path)
    model = load_model(path, **load_options)
    make_saveable(model)
    tokenizer = load_tokenizer(path, load_options.get("trust_remote_code", False))
    with atomic_directory(directory) as stage:
        save_steered(model, tokenizer, conditioning, stage, facts)


def export_adapter(path: str | os.PathLike, directory: Path, **load_options: Any) -> None:
    """Write the adapter of a checkpoint, so that `peft` alone can load it.

    The reward tokens' rows are a part of the adapter. Where it has no place for those of the output layer
    (`hold_output_rows`), this layer and the input embedding are saved as a whole.

    Args:
        path, directory, load_options: as in `export_merged`.

    Raises:
        UserError: Quark did not train the model, it has no adapter, or it cannot be loaded or written.
    """
    conditioning, facts = _conditioning_and_facts(path)
    adapted = load_adapted(path, **load_options)
    if adapted is None:
        raise UserError(f"model {str(path)!r}: must be a checkpoint with an adapter. Use --merge for whole weights.")
    tokenizer = load_tokenizer(path, load_options.get("trust_remote_code", False))
    adapted, has_rows = hold_output_rows(adapted, conditioning.new_token_ids)
    with atomic_directory(directory) as stage:
        adapted.save_pretrained(stage, save_embedding_layers=not has_rows)
        tokenizer.save_pretrained(stage)
        conditioning.save(stage, **facts)
        write_model_card(stage)


def export_gguf(path: str | os.PathLike, file: Path, weight_type: str, **load_options: Any) -> str:
    """Write a trained model as a GGUF file for llama.cpp (`gguf_writing.write_gguf`); an adapter is merged.

    Args:
        path, load_options: as in `export_merged`.
        file: the file to write.
        weight_type: f32, f16 or q8_0.

    Returns:
        What users must put in front of a text; "" if llama.cpp does it.

    Raises:
        UserError: Quark did not train the model, it cannot be loaded, or GGUF cannot express it.
    """
    conditioning, _ = _conditioning_and_facts(path)
    tokenizer = load_tokenizer(path, load_options.get("trust_remote_code", False))
    return write_gguf(load_model(path, **load_options), tokenizer, conditioning, file, weight_type)


def _conditioning_and_facts(path: str | os.PathLike) -> tuple[Conditioning, dict[str, Any]]:
    """The reward tokens of a model, and the other facts in its `quark.json`."""
    conditioning = Conditioning.load(path)
    if conditioning is None:
        raise UserError(f"model {str(path)!r}: must be a model that Quark trained. It has no quark.json.")
    return conditioning, {k: fact for k, fact in (read_quark_json(path) or {}).items() if k != "conditioning"}


def try_saving(
    model: Any, tokenizer: PreTrainedTokenizerBase, conditioning: Conditioning, facts: dict[str, Any]
) -> None:
    """Save all of a checkpoint but the weights, into a temporary directory: a run must not fail at its end.

    Raises:
        UserError: something cannot be saved.
    """
    has_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They appear when the run itself saves.
            if hasattr(model, "merge_and_unload"):
                from peft import get_peft_model_state_dict

                get_peft_model_state_dict(model)
                for config in model.peft_config.values():
                    config.save_pretrained(directory)
                model = model.get_base_model()
            if getattr(model, "is_quantized", False):  # Its weights are dequantized before they are saved.
                for part in (model.config, model.generation_config, tokenizer):
                    part.save_pretrained(directory)
            else:
                _save_model(model, tokenizer, conditioning, Path(directory), state_dict={})
            json.dumps(nan_to_null(facts))
    except Exception as error:
        # Whatever fails here would fail at the first checkpoint. Libraries raise many types of exception.
        name = model.config._name_or_path
        raise UserError(f"model {name!r}: cannot be saved ({one_line(error)}). Correct the model's files.") from error
    finally:
        if has_bars:
            logging.enable_progress_bar()


def make_saveable(model: PreTrainedModel) -> None:
    """Correct a generation config that transformers loads but refuses to save, in place.

    Parameters of sampling without `do_sample`, as in Llama 2, switch sampling on; other unused parameters are removed.
    """
    config = model.generation_config
    if (problem := _problem_of(config)) and "`do_sample=True`" in problem:
        config.do_sample = True
        problem = _problem_of(config)
    for name in re.findall(r"^- `(\w+)`:", problem or "", re.MULTILINE):
        setattr(config, name, None)


def _problem_of(config: Any) -> str | None:
    """Why transformers refuses to save a generation config; None if it does not."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def model_identity(model: PreTrainedModel) -> dict[str, Any]:
    """Identify a model: its name, its commit on the hub (None for a path), its size, a digest of its weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    name = getattr(model.config, "_name_or_path", "") or None
    return {
        "name": os.path.abspath(name) if name and os.path.exists(name) else name,
        "revision": getattr(model.config, "_commit_hash", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": digest.hexdigest(),
        **({"load_in_4bit": True} if getattr(model, "is_quantized", False) else {}),
    }
