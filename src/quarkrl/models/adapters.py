"""Adapters of `peft`: one that is trained with the reward tokens, and saved ones, which are merged into their base.

An adapter must be mergeable, because `final/` holds merged weights. In many models the output layer shares the weights
of the input embedding. Where an adapter changes one of the two, the output layer first gets weights of its own.
"""

import copy
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from quarkrl.errors import UserError, one_line
from quarkrl.hub_access import only_cache_if_unreachable
from quarkrl.models.encoder_decoder import is_encoder_decoder
from quarkrl.models.options import AdapterOptions

_WRAPPERS = ("token_adapter", "base_layer", "original_module")  # What peft calls a layer that it wraps.
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def lora_config(options: AdapterOptions) -> Any | None:
    """Return the `peft` configuration of the adapter to train; None if all weights are trained.

    Raises:
        UserError: all weights are trained, and an option of the adapter is set.
    """
    options.check_adapter()
    if not options.lora_rank:
        return None
    from peft import LoraConfig

    names = options.lora_target_modules
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear" if names == ["all-linear"] else names,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type="CAUSAL_LM",
    )


def find_adapter(path: Any) -> Path | None:
    """Return the local directory of a saved adapter, from a directory or the hub; None if `path` is no adapter."""
    flags = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        with only_cache_if_unreachable(path):
            file = cached_file(str(path), CONFIG_FILE, **flags)
            if file is not None:  # The hub's files come one by one, into one directory.
                cached_file(str(path), WEIGHTS_FILE, **flags)
    except OSError:
        return None  # There is nothing of this name, which loading the model reports.
    return None if file is None else Path(file).parent


def read_adapter(directory: Path) -> Any:
    """Read the `peft` configuration of a saved adapter.

    Raises:
        UserError: the adapter is of a kind that cannot be merged.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(directory))
    _refuse_prompt_learning(config, f"adapter {str(directory)!r}")
    config.inference_mode = False  # The weights to load are then those that require gradients.
    return config


def saved_rows(directory: Path, model: PreTrainedModel) -> int:
    """Return the number of embedding rows in a saved adapter; 0 if it holds no embedding."""
    from safetensors import safe_open

    name = _name_of(model.get_input_embeddings(), model)
    with safe_open(_weights_file(directory), framework="pt") as file:
        keys = [key for key in file.keys() if _own_name(key).endswith(f".{name}.weight")]  # noqa: SIM118 (not a dict)
        return max((file.get_slice(key).get_shape()[0] for key in keys), default=0)


def load_weights(model: PreTrainedModel, directory: Path, config: Any) -> Any:
    """Return a base model, which has all embedding rows, with a saved adapter on it.

    Raises:
        UserError: the adapter does not fit the model, or is incomplete.
    """
    _weights_file(directory)
    adapted = attach(model, config, f"adapter {str(directory)!r}")
    loaded = adapted.load_adapter(str(directory), "default", is_trainable=True, torch_device="cpu")
    weights = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    if missing := sorted(weights & set(loaded.missing_keys)):
        raise UserError(
            f"adapter {str(directory)!r}: has no weights for {len(missing)} tensors, among them {missing[0]}. "
            "Name a complete adapter."
        )
    return adapted


def add_adapter(model: PreTrainedModel, config: Any, token_ids: Sequence[int]) -> Any:
    """Return a model with a new adapter that also trains the input embedding rows of some tokens.

    Args:
        model: a model without adapters.
        config: the `peft` configuration; it is not changed.
        token_ids: the tokens whose rows must be trained.

    Raises:
        UserError: the adapter cannot be merged, does not fit the model, changes the model's own weights, or cannot
            train the rows.
    """
    _refuse_prompt_learning(config, "peft_config")
    config = copy.deepcopy(config)
    config.task_type = "SEQ_2_SEQ_LM" if is_encoder_decoder(model) else "CAUSAL_LM"
    config.inference_mode, config.base_model_name_or_path = False, None
    if getattr(config, "ensure_weight_tying", False) and is_tied(model):
        raise UserError(
            "peft_config ensure_weight_tying True: must be False, because such an adapter cannot be merged into a "
            "copy. Without it, the output layer gets weights of its own."
        )
    before = _checksums(model)
    adapted = attach(model, config, "peft_config", token_ids)
    after = _checksums(adapted.get_base_model())
    if any(after.get(name) != checksum for name, checksum in before.items()):
        raise UserError(
            f"peft_config init_lora_weights {getattr(config, 'init_lora_weights', None)!r}: must keep the weights of "
            "the model, because the reference is the model without the adapter. Set init_lora_weights=True."
        )
    if token_ids and not _trains_rows(adapted.get_input_embeddings(), token_ids):
        raise UserError(
            f"peft_config {config.peft_type.value}: must train the embedding rows of the reward tokens. Use "
            "LoraConfig, or add the input embedding to modules_to_save."
        )
    _check_mergeable(adapted, config)
    return adapted


def attach(model: PreTrainedModel, config: Any, subject: str, token_ids: Sequence[int] = ()) -> Any:
    """Return a model with an adapter on it.

    Args:
        model: a model without adapters. Its output layer is untied if the adapter changes one of the tied layers.
        config: the `peft` configuration, which is completed in place.
        subject: what an error message names.
        token_ids: tokens whose input embedding rows to train, where the adapter does not train the whole embedding.

    Raises:
        UserError: the adapter does not fit the model.
    """
    from peft import get_peft_model

    from quarkrl.models.token_rows import use_token_rows

    try:
        changes_inputs, changes_outputs = _changes_of(model, config)
        if token_ids:
            _add_rows(model, config, token_ids, train_rows=not changes_inputs)
        indices = getattr(config, "trainable_token_indices", None)
        splits = changes_inputs or changes_outputs or (isinstance(indices, dict) and len(indices) > 1)
        if splits and not getattr(config, "ensure_weight_tying", False):
            untie(model)
        adapted = get_peft_model(model, config)
        use_token_rows(adapted)
    except Exception as error:
        # peft raises exceptions of many types for a configuration that does not fit a model.
        raise UserError(f"{subject}: does not fit the model ({one_line(error)}). Correct the configuration.") from error
    # By default peft writes the whole embedding and output layer if rows were added. Their rows are drawn again.
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def merge(adapted: Any) -> PreTrainedModel:
    """Merge the active adapters of a `PeftModel` into its base, in place, and return the base, all of it trainable.

    Raises:
        UserError: an adapter is of a kind that cannot be merged.
    """
    for config in adapted.peft_config.values():
        _refuse_prompt_learning(config, "model")
    if getattr(adapted.get_base_model(), "is_quantized", False):
        adapted = _dequantize(adapted)
    inputs, outputs = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    follows = getattr(getattr(outputs, "token_adapter", outputs), "tied_adapter", None)  # peft trains both as one.
    splits = (_is_wrapped(inputs) or _is_wrapped(outputs)) and not follows
    if splits:
        untie(adapted.get_base_model())
    model = adapted.merge_and_unload().requires_grad_(True)
    if splits:
        untie(model)  # The adapter's own weights of the two layers may be tied.
    return model


def _dequantize(adapted: Any) -> Any:
    """Return a quantized model with its adapter as a model of whole numbers of 32 bits; `adapted` loses its adapter.

    Merged into quantized weights, an adapter would be rounded as they are.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(adapted.peft_config[adapted.active_adapters[0]])
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    model = adapted.unload().dequantize().float()
    whole = attach(model, config, "model")
    set_peft_model_state_dict(whole, weights)
    return whole


def hold_output_rows(adapted: Any, token_ids: Sequence[int]) -> tuple[Any, bool]:
    """Put the rows of tokens in an output layer with weights of its own into the adapter, where peft can do that.

    Args:
        adapted: the model; it loses its adapter to the one that is returned.
        token_ids: the tokens that were added to the base model.

    Returns:
        The model, and whether its adapter holds these rows. peft accepts linear layers without bias or other adapter.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    outputs = adapted.get_output_embeddings()
    if not token_ids or is_tied(adapted):
        return adapted, True
    config = copy.deepcopy(adapted.peft_config[adapted.active_adapters[0]])
    indices = getattr(config, "trainable_token_indices", None)
    if not indices or not isinstance(outputs, nn.Linear) or outputs.bias is not None:
        return adapted, False
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    model = adapted.unload()
    if not isinstance(indices, dict):
        indices = {_name_of(model.get_input_embeddings(), model): indices}
    config.trainable_token_indices = {**indices, _name_of(outputs, model): list(token_ids)}
    whole = attach(model, config, "model")
    set_peft_model_state_dict(whole, get_peft_model_state_dict(whole, save_embedding_layers=False) | weights)
    return whole, True


def merge_start(adapted: Any) -> tuple[PreTrainedModel, Any]:
    """Merge a `PeftModel` that training starts from.

    Returns:
        The merged model, and the configuration of its adapter, for a new adapter. The model keeps its name if the
        adapter has not changed its weights; otherwise it has none, because no directory holds these weights.
    """
    config = copy.deepcopy(adapted.peft_config[adapted.active_adapters[0]])
    before = _checksums(adapted.get_base_model())
    model = merge(adapted)
    if any(before.get(name) != checksum for name, checksum in _checksums(model).items()):
        rename(model, "")
    return model, config


def rename(model: PreTrainedModel, name: str) -> None:
    """Set the name of a model whose weights were merged; "" for no name.

    `peft` reads none in any case: it looks for a config.json under the name, and a saved adapter has none.
    """
    model.config._name_or_path, model.name_or_path = name, ""


def untie(model: PreTrainedModel) -> None:
    """Give the output layer weights of its own, with the values of the input embedding, if the two are tied.

    Raises:
        UserError: they are tied in an encoder–decoder model, whose encoder and decoder share the embedding too.
    """
    if not is_tied(model):
        return
    if is_encoder_decoder(model):
        raise UserError(
            "adapter: must leave embedding and output layer of an encoder–decoder model as they are, because all parts "
            "share them. Target other modules."
        )
    layer = _innermost(model.get_output_embeddings())
    layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # What transformers would tie again, and leaves out of a checkpoint.


def is_tied(model: Any) -> bool:
    """Return whether the output layer has the weights of the input embedding, under the wrappers of an adapter."""
    inputs, outputs = _innermost(model.get_input_embeddings()), _innermost(model.get_output_embeddings())
    return outputs is not None and inputs.weight is outputs.weight


def _refuse_prompt_learning(config: Any, subject: str) -> None:
    """Raise for an adapter that has nothing to merge: virtual tokens, or states beside the weights."""
    if config.is_prompt_learning or config.is_adaption_prompt:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(
            f"{subject} {kind}: must be an adapter that can be merged into weights, not a prompt. Use LoraConfig."
        )


def _check_mergeable(adapted: Any, config: Any) -> None:
    """Raise if a layer of the adapter cannot be merged; `final/` would fail after all training."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {type(module): module for module in adapted.modules() if isinstance(module, BaseTunerLayer)}
    try:
        for layer in layers.values():
            copy.deepcopy(layer).merge()
    except Exception as error:
        # Each kind of adapter refuses in its own way.
        raise UserError(
            f"peft_config {config.peft_type.value}: must be an adapter that can be merged into weights "
            f"({one_line(error)}). Use LoraConfig."
        ) from error


def _changes_of(model: PreTrainedModel, config: Any) -> tuple[bool, bool]:
    """Whether an adapter changes the input embedding and the output layer, apart from rows of single tokens.

    Which layers a configuration targets is known once it is applied. Modules to save are left out, because peft does
    not restore them; so are rows of tokens, because peft fails where they meet another adapter.
    """
    from peft import get_peft_model
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = model.get_input_embeddings(), model.get_output_embeddings()
    names = [_name_of(layer, model) for layer in layers]
    saved = [any(name.endswith(module) for module in getattr(config, "modules_to_save", None) or ()) for name in names]
    probe = copy.deepcopy(config)
    for field in ("modules_to_save", "trainable_token_indices"):
        if hasattr(probe, field):
            setattr(probe, field, None)
    # The adapter itself draws the same numbers, and gives the same warnings where they still apply.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probed = get_peft_model(model, probe)
    layers = probed.get_input_embeddings(), probed.get_output_embeddings()
    targeted = [_is_wrapped(layer) and not isinstance(layer, TrainableTokensLayer) for layer in layers]
    probed.unload()
    return saved[0] or targeted[0], saved[1] or targeted[1]


def _name_of(layer: Any, model: nn.Module) -> str:
    """The name of a layer in a model; "" if the model has no such layer."""
    return next((name for name, module in model.named_modules() if module is layer), "")


def _is_wrapped(layer: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _innermost(layer: Any) -> Any:
    """The model's own layer under the wrappers of an adapter."""
    while layer is not None and (inner := next(filter(None, map(layer._modules.get, _WRAPPERS)), None)):
        layer = inner
    return layer


def _own_name(name: str) -> str:
    """The name of a weight without the wrappers of an adapter."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _add_rows(model: PreTrainedModel, config: Any, token_ids: Sequence[int], train_rows: bool) -> None:
    """Add tokens to those whose rows a configuration trains. `train_rows`: nothing else changes the input embedding."""
    if hasattr(config, "token_indices"):
        config.token_indices = _union(config.token_indices, token_ids)
    elif train_rows and hasattr(config, "trainable_token_indices"):
        indices = config.trainable_token_indices
        if isinstance(indices, dict):
            name = _name_of(model.get_input_embeddings(), model)
            key = next((key for key in indices if f".{name}".endswith(f".{key}")), name)
            config.trainable_token_indices = {**indices, key: _union(indices.get(key, ()), token_ids)}
        else:
            config.trainable_token_indices = _union(indices or (), token_ids)


def _union(first: Iterable[int], second: Iterable[int]) -> list[int]:
    return list(dict.fromkeys((*first, *second)))


def _trains_rows(embedding: nn.Module, token_ids: Sequence[int]) -> bool:
    """Whether the embedding of each token has a gradient in some weight that is trained."""
    weights = [weight for weight in embedding.parameters() if weight.requires_grad]
    if not weights:
        return False
    with torch.enable_grad():
        for token in token_ids:
            row = embedding(torch.tensor([[token]], device=weights[0].device)).float().sum()
            if not row.requires_grad:
                return False
            gradients = torch.autograd.grad(row, weights, allow_unused=True)
            if not any(gradient is not None and gradient.any() for gradient in gradients):
                return False
    return True


def _checksums(model: nn.Module) -> dict[str, int]:
    """The sum of each weight's bits as integers, by its name without the wrappers of an adapter."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        _own_name(name): int(weight.detach().contiguous().view(integers[weight.itemsize]).sum())
        for name, weight in model.named_parameters(remove_duplicate=False)  # Tied layers may be tied no longer.
    }


def _weights_file(directory: Path) -> Path:
    """The weights of a saved adapter.

    Raises:
        UserError: it has none in safetensors.
    """
    if not (file := directory / WEIGHTS_FILE).is_file():
        raise UserError(
            f"adapter {str(directory)!r}: must have its weights in {WEIGHTS_FILE}. Save it again with save_pretrained."
        )
    return file
