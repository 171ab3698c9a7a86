"""What a run starts from: the policy with its reward tokens, the reference, their tokenizers."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.export import model_identity
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
        policy_digest: SHA-256 of the weights that the policy starts from.
        reference_identity: which model the reference is.
    """

    policy: Any
    reference: PreTrainedModel | None
    conditioning: Conditioning
    steered_tokenizer: PreTrainedTokenizerBase
    policy_digest: str
    reference_identity: dict[str, Any]


def prepare_models(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ref_model: PreTrainedModel | None,
    peft_config: Any | None,
    args: QuarkConfig,
    attributes: tuple[str, ...],
) -> Models:
    """Make the policy and the reference of a run. `model` is changed in place: it becomes the policy.

    Args:
        model: the model to train.
        tokenizer: its tokenizer, without reward tokens.
        ref_model: the reference; None for a frozen copy of `model`.
        peft_config: an adapter to train instead of all weights.
        args: the run's options.
        attributes: the names of the rewards that condition.

    Raises:
        UserError: the model already has reward tokens, or the reference does not fit the model or the options.
    """
    reference_identity = model_identity(ref_model or model)
    policy_identity = reference_identity if ref_model is None else model_identity(model)
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
        tokenizer, model, args.num_quantiles, attributes, seed=args.seed
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
        steered_tokenizer=conditioning.steer_tokenizer(extended_tokenizer),
        policy_digest=policy_identity["sha256"],
        reference_identity=reference_identity,
    )
