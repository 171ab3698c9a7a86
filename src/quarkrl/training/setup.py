"""What a run starts from: the policy with its reward tokens, the reference, their tokenizers."""

import copy
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.builtin import locate_model
from quarkrl.data.encoding import for_encoder
from quarkrl.errors import UserError
from quarkrl.models.adapters import merge, merge_start
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.encoder_decoder import check_encoder_decoder, is_encoder_decoder
from quarkrl.models.export import make_saveable, model_identity
from quarkrl.models.loading import load_model, load_tokenizer
from quarkrl.models.words import Words
from quarkrl.training.config import QuarkConfig


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Attributes:
        policy: the model to train, with reward tokens, and with an adapter if one is trained.
        reference: the reference p_0 as a model of its own. None if the policy without its adapter is the reference,
            or if nothing needs one.
        conditioning: the reward tokens.
        steered_tokenizer: puts the best reward token in front of a prompt.
        start_identity: which model the policy starts from.
        reference_identity: which model the reference is.
    """

    policy: Any
    reference: PreTrainedModel | None
    conditioning: Conditioning
    steered_tokenizer: PreTrainedTokenizerBase
    start_identity: dict[str, Any]
    reference_identity: dict[str, Any]


def load_start(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, peft_config: Any | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Any | None]:
    """Load what training starts from.

    Args:
        model: a model, the name or directory of one, or a `PeftModel`, whose adapter is merged.
        tokenizer: its tokenizer; None for that of the model.
        peft_config: the adapter to train; None for all weights, or for one like the adapter of a `PeftModel`.

    Returns:
        A model without adapters, its tokenizer, and the adapter to train.

    Raises:
        UserError: there is no such model, or its adapter cannot be merged.
    """
    if isinstance(model, str | os.PathLike):
        model = load_model(locate_model(model))
    tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
    tokenizer = for_encoder(tokenizer) if is_encoder_decoder(model) else tokenizer
    if hasattr(model, "merge_and_unload"):
        model, own_config = merge_start(model)
        return model, tokenizer, peft_config or own_config
    return _without_adapters(model, "model"), tokenizer, peft_config


def load_reference(ref_model: Any | None) -> PreTrainedModel | None:
    """Load a reference: a model, the name or directory of one, or a `PeftModel`, whose adapter is merged.

    Raises:
        UserError: there is no such model, or its adapter cannot be merged.
    """
    if ref_model is None or isinstance(ref_model, str | os.PathLike):
        return None if ref_model is None else load_model(locate_model(ref_model))
    return merge(ref_model) if hasattr(ref_model, "merge_and_unload") else _without_adapters(ref_model, "ref_model")


def _without_adapters(model: Any, option: str) -> PreTrainedModel:
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{option} {type(model).__name__}: must be a causal language model of transformers, its name or its "
            "directory, or a PeftModel that can be merged. Use AutoModelForCausalLM, or AutoModelForSeq2SeqLM."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{option} {type(model).__name__}: must not have an adapter that transformers has loaded into it. Give "
            "the adapter's directory, or a PeftModel."
        )
    return model


def prepare_models(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ref_model: PreTrainedModel | None,
    peft_config: Any | None,
    args: QuarkConfig,
    attributes: tuple[str, ...],
    words: Words,
) -> Models:
    """Make the policy and the reference of a run. `model` is changed in place: it becomes the policy.

    Args:
        model: the model to train.
        tokenizer: its tokenizer, without reward tokens.
        ref_model: the reference; None for a frozen copy of `model`.
        peft_config: an adapter to train instead of all weights.
        args: the run's options.
        attributes: the names of the rewards that condition.
        words: what stands for the quantiles.

    Raises:
        UserError: the model already has reward tokens, or the reference does not fit the model or the options.
    """
    _check_kinds(model, ref_model, args)
    make_saveable(model)
    reference_identity = model_identity(ref_model or model)
    start_identity = reference_identity if ref_model is None else model_identity(model)
    reference = ref_model
    if ref_model is None and peft_config is None and (args.kl_coef or args.guidance_from == "reference"):
        reference = copy.deepcopy(model)
    if args.ref_dtype != "same":
        if reference is None:
            raise UserError(
                f"ref_dtype {args.ref_dtype}: must be same, since the run has no reference model of its own (adapter, "
                "or kl_coef 0). Remove --ref_dtype."
            )
        reference.to(getattr(torch, args.ref_dtype))
    conditioning, extended_tokenizer = Conditioning.add_to(
        tokenizer, model, args.num_quantiles, attributes, seed=args.seed, words=words
    )
    rows = None if ref_model is None else ref_model.get_input_embeddings().weight.shape[0]
    if rows is not None and rows < conditioning.vocab_size:
        raise UserError(
            f"ref_model with {rows} embedding rows: must have at least {conditioning.vocab_size}, as model has. "
            "Use a reference with the same tokenizer."
        )
    policy: Any = model
    if peft_config is not None:
        torch.manual_seed(args.seed)  # The adapter starts from random weights.
        policy = conditioning.add_adapter(model, peft_config)
    return Models(
        policy=policy,
        reference=reference,
        conditioning=conditioning,
        steered_tokenizer=conditioning.steer_tokenizer(extended_tokenizer, keep_end=is_encoder_decoder(model)),
        start_identity=start_identity,
        reference_identity=reference_identity,
    )


def _check_kinds(model: PreTrainedModel, ref_model: PreTrainedModel | None, args: QuarkConfig) -> None:
    """Check that policy and reference read a prompt in the same way, and that the run supports it."""
    check_encoder_decoder(model, "model")
    if ref_model is not None and is_encoder_decoder(ref_model) != is_encoder_decoder(model):
        raise UserError(
            f"ref_model {type(ref_model).__name__}: must be an encoder–decoder model if model is one, and otherwise "
            f"not. model is {type(model).__name__}."
        )
    if is_encoder_decoder(model) and args.engine != "builtin":
        raise UserError(f"engine {args.engine}: must be builtin for an encoder–decoder model. Remove --engine.")
