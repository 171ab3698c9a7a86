"""What a run starts from: policy, reference and tokenizers; rewards, prompts and scored samples."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.builtin import locate_model
from quarkrl.data.chat_defaults import with_chat_defaults
from quarkrl.data.chats import with_fixed_date
from quarkrl.data.encoding import for_encoder
from quarkrl.data.prompts import Prompts
from quarkrl.data.scored import ScoredSamples, distinct_prompts
from quarkrl.errors import UserError
from quarkrl.models.adapters import merge, merge_start
from quarkrl.models.conditioning import Conditioning, bos_of_chats, new_token_names
from quarkrl.models.encoder_decoder import check_encoder_decoder, is_encoder_decoder
from quarkrl.models.export import make_saveable, model_identity
from quarkrl.models.loading import eos_ids, load_model, load_tokenizer, longest_prompt
from quarkrl.models.precision import coarse_weights_note, slow_bf16_note
from quarkrl.models.words import Words
from quarkrl.rewards.scorer import Scorer
from quarkrl.training.checks import check_names, check_pairs, check_quantiles
from quarkrl.training.config import QuarkConfig
from quarkrl.training.identity import QuarkIdentity, chat_date_note, find_chat_date, run_identity
from quarkrl.training.memory import MemoryPlan, plan_memory
from quarkrl.training.prompt_supply import PromptSupply, encode_prompts_of
from quarkrl.training.scored_data import Rewards, encode_scored, load_scored, make_scorer
from quarkrl.training.served import check_served_ids
from quarkrl.training.time_left import Plan


class LoadedModels(NamedTuple):
    """The models that a run is given, loaded, without adapters and reward tokens.

    Attributes:
        policy: the model to train.
        tokenizer: its tokenizer.
        reference: the reference p_0 if it is another model than the policy.
        adapter: the configuration of the adapter to train; None for all weights.
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | None
    adapter: Any | None


@dataclass(frozen=True)
class Models:
    """The models of a run.

    Attributes:
        policy: the model to train, with reward tokens, and with an adapter if one is trained.
        reference: the reference p_0 as a model of its own. None if the policy without its adapter is the reference,
            or if nothing needs one.
        adapter: the configuration of an adapter that is trained, if any.
        conditioning: the reward tokens.
        steered_tokenizer: puts the best reward token in front of a prompt.
        identities: which model the policy starts from ("start"), and which the reference is ("reference").
    """

    policy: Any
    reference: PreTrainedModel | None
    adapter: Any | None
    conditioning: Conditioning
    steered_tokenizer: PreTrainedTokenizerBase
    identities: dict[str, dict[str, Any]]

    @property
    def shares_start(self) -> bool:
        """Whether policy and reference start with the same weights."""
        return self.identities["start"]["sha256"] == self.identities["reference"]["sha256"]


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        args: the options of the run.
        models: policy and reference, with the tokenizer of the final model.
        scorer: the rewards.
        tokenizer: encodes the prompts of the run, without reward tokens.
        chat_date: the date of the run's chats (`find_chat_date`).
        end_ids: EOS ids.
        encode: encodes prompts: `Prompts.encode` with its arguments.
        explores: whether the run explores. Otherwise it learns from `scored` alone.
        supply: the prompts that each iteration explores.
        eval_prompts: held-out prompts, if any.
        scored: samples in the place of the first exploration, if any.
        longest_prompt: tokens of the longest prompt with its prefix; of a stream, of the longest that may come.
        memory_plan: how the run samples within the memory that it has.
    """

    args: QuarkConfig
    models: Models
    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    chat_date: datetime | None
    end_ids: list[int]
    encode: Callable[..., Prompts]
    explores: bool
    supply: PromptSupply
    eval_prompts: Prompts | None
    scored: ScoredSamples | None
    longest_prompt: int
    memory_plan: MemoryPlan

    @property
    def plan(self) -> Plan:
        """What the run will do."""
        return Plan(self.args, len(self.supply.first), len(self.scored or ()), self.explores)

    @property
    def notes(self) -> list[str]:
        """What the user should know before the run starts."""
        notes = [
            self.scored.note if self.scored else None,
            self.plan.describe(),
            self.plan.describe_overdraw(),
            self.memory_plan.message,
            slow_bf16_note() if self.args.bf16 else None,
            chat_date_note(self.chat_date, self.supply.first.as_encoded),
            coarse_weights_note(self.models.policy),
        ]
        return [note for note in notes if note]

    @property
    def identity(self) -> QuarkIdentity:
        """The identity of the run."""
        return run_identity(
            self.args,
            self.models.identities["start"]["sha256"],
            self.models.identities["reference"]["sha256"],
            self.supply.first.ids,
            None if self.eval_prompts is None else self.eval_prompts.ids,
            self.scorer.identity,
            self.models.adapter,
            self.chat_date,
            kind_of_prompts="stream" if self.supply.streamed else "" if self.explores else "unexplored",
            scored=self.scored,
            is_encoder_decoder=is_encoder_decoder(self.models.policy),
        )


def load_models(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, ref_model: Any | None, peft_config: Any, args: QuarkConfig
) -> LoadedModels:
    """Load what training starts from.

    Args:
        model: a model, the name or directory of one, or a `PeftModel`, whose adapter is merged.
        tokenizer: its tokenizer; None for that of the model.
        ref_model: the reference, of the same types as `model`; None for none.
        peft_config: the adapter to train; None for all weights, or for one like the adapter of a `PeftModel`.
        args: the run's options.

    Raises:
        UserError: there is no such model, or its adapter cannot be merged.
    """
    if isinstance(model, str | os.PathLike):
        model = load_model(locate_model(model))
    tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
    tokenizer = for_encoder(tokenizer) if is_encoder_decoder(model) else tokenizer
    if hasattr(model, "merge_and_unload"):
        model, own_config = merge_start(model)
        peft_config = peft_config or own_config
    else:
        model = _without_adapters(model, "model")
    tokenizer = with_chat_defaults(tokenizer, args.system_prompt, args.chat_template_kwargs)
    return LoadedModels(model, tokenizer, _load_reference(ref_model), peft_config)


def _load_reference(ref_model: Any | None) -> PreTrainedModel | None:
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


def prepare_start(
    args: QuarkConfig,
    loaded: LoadedModels,
    rewards: Rewards | Scorer | None,
    train_dataset: Any | None,
    eval_dataset: Any | None,
    scored_data: Any | None,
) -> Start:
    """Prepare and check what a run starts from. The policy is changed in place.

    Args:
        args: the options of the run.
        loaded: the models.
        rewards, train_dataset, eval_dataset, scored_data: as in `QuarkTrainer`.

    Raises:
        UserError: the arguments do not work together, or one of them is bad.
    """
    model, tokenizer = loaded.policy, loaded.tokenizer
    chat_date = find_chat_date(tokenizer, Path(args.output_dir), args.world_size)
    plain_tokenizer = with_fixed_date(tokenizer, chat_date) if chat_date else tokenizer
    explores = train_dataset is not None or scored_data is None
    scorer = make_scorer(rewards, args, calls_rewards=explores or eval_dataset is not None)
    check_names(args, scorer)
    words = Words.choose(args.conditioning, args.words, scorer.attribute_rewards, args.num_quantiles)
    prefix_length = words.max_length(plain_tokenizer)
    max_prompt_length = longest_prompt(model, args.max_completion_length) - prefix_length
    encode = _make_encoder(plain_tokenizer, scorer.attributes, words, max_prompt_length, args)
    rows = None if scored_data is None else load_scored(scored_data, args, scorer.attributes, encode)
    supply = PromptSupply(distinct_prompts(rows) if rows and not explores else train_dataset, encode, args)
    eval_prompts = None
    if eval_dataset is not None:
        eval_prompts = encode_prompts_of("eval_dataset", eval_dataset, encode, args.skip_bad_prompts)
    check_quantiles(args, len(supply.first), explores)
    check_pairs(args, explores)
    models = prepare_models(loaded, args, scorer.attributes, words)
    end_ids = eos_ids(model, plain_tokenizer, models.conditioning.vocab_size)
    scored = None if rows is None else encode_scored(rows, plain_tokenizer, end_ids, args)
    to_read = Prompts.join([supply.first, *([scored.prompts] if scored else [])])
    steered = models.steered_tokenizer
    steered = check_served_ids(plain_tokenizer, steered, models.conditioning, model.config, to_read, chat_date)
    lengths, eval_lengths = (
        [len(ids) + prefix_length for ids in prompts.ids] if prompts else [] for prompts in (to_read, eval_prompts)
    )
    return Start(
        args,
        replace(models, steered_tokenizer=steered),
        scorer,
        plain_tokenizer,
        chat_date,
        end_ids,
        encode,
        explores,
        supply,
        eval_prompts,
        scored,
        longest_prompt=max([*lengths, *eval_lengths, max_prompt_length if supply.streamed else 0]),
        memory_plan=plan_memory(models.policy, args, lengths, eval_lengths, models.reference),
    )


def _make_encoder(
    tokenizer: PreTrainedTokenizerBase, attributes: tuple[str, ...], words: Words, max_length: int, args: QuarkConfig
) -> Callable[..., Prompts]:
    """Return `Prompts.encode` with the arguments for a run."""
    bos_id = bos_of_chats(tokenizer)
    return partial(
        Prompts.encode,
        tokenizer=tokenizer,
        max_length=max_length,
        skip_bad=args.skip_bad_prompts,
        reserved=new_token_names(tokenizer, attributes, words),
        is_bad_start=lambda ids: ids[0] == bos_id,
        last_assistant_turn=args.last_assistant_turn,
        in_template=args.raw is False,
    )


def prepare_models(loaded: LoadedModels, args: QuarkConfig, attributes: tuple[str, ...], words: Words) -> Models:
    """Make the policy and the reference of a run. The policy is changed in place.

    Args:
        loaded: the models. Without a reference, it is a frozen copy of the policy, or the policy without its adapter.
        args: the run's options.
        attributes: the names of the rewards that condition.
        words: what stands for the quantiles.

    Raises:
        UserError: the model already has reward tokens, or the reference does not fit the model or the options.
    """
    model, tokenizer, ref_model, peft_config = loaded
    _check_kinds(model, ref_model, args)
    make_saveable(model)
    reference_identity = model_identity(ref_model or model)
    start_identity = reference_identity if ref_model is None else model_identity(model)
    reference, is_needed = ref_model, args.compares_with_reference or args.guidance_from == "reference"
    if ref_model is None and peft_config is None and is_needed:
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
        adapter=peft_config,
        conditioning=conditioning,
        steered_tokenizer=conditioning.steer_tokenizer(extended_tokenizer, keep_end=is_encoder_decoder(model)),
        identities={"start": start_identity, "reference": reference_identity},
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
