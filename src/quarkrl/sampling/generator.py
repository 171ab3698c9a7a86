"""`QuarkGenerator`: completions as text, from any quantile of a model that Quark trained."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.builtin import locate_model
from quarkrl.data.chat_defaults import with_chat_defaults
from quarkrl.data.encoding import Prompt, decode_completions, encode_prompts, for_encoder, warn_of_second_bos
from quarkrl.errors import UserError, did_you_mean, shorten
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.device import default_device
from quarkrl.models.encoder_decoder import is_encoder_decoder
from quarkrl.models.loading import (
    context_length,
    eos_ids,
    load_model,
    load_tokenizer,
    locate_revision,
    longest_prompt,
)
from quarkrl.models.quark_json import reference_name
from quarkrl.models.special_tokens import surrounding_ids
from quarkrl.sampling.guidance import Contrast, GuidanceOptions, make_contrast
from quarkrl.sampling.options import GuidanceRule, GuidanceScale, read_scale
from quarkrl.sampling.sampler import complete
from quarkrl.sampling.strategy import Sampling
from quarkrl.sampling.streaming import stream_tokens

STEERING = GuidanceOptions(guidance_scale=2.0)  # The default of a model that another one steers.
_PROBE = "The quick brown fox, 1984 café"  # Both tokenizers must encode it alike, with the same BOS.


class QuarkGenerator:
    """Generates completions with a model; if Quark trained it, from the quantile that is requested.

    Args:
        model: a causal or encoder–decoder language model.
        tokenizer: its tokenizer.
        conditioning: its reward tokens; None if it has none.
        reference: name or directory of the model before training, which guidance may need.
        trust_remote_code: run the Python code in the reference's repository.
        default_guidance: of completions of the best quantile, unless a call says otherwise.
        steered_by: a smaller model that Quark trained, which steers this one. Quantiles are then its quantiles.

    Raises:
        UserError: the conditioning does not fit the model, or `steered_by` does not.

    Example:
        >>> QuarkGenerator.from_pretrained("run/final").generate("You are", quantile="best")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        conditioning: Conditioning | None,
        reference: str | None = None,
        trust_remote_code: bool = False,
        default_guidance: GuidanceOptions = GuidanceOptions(),  # noqa: B008 - immutable
        steered_by: "QuarkGenerator | None" = None,
    ):
        self.model = model
        self.is_encoder_decoder = is_encoder_decoder(model)
        self.tokenizer = for_encoder(tokenizer) if self.is_encoder_decoder else tokenizer
        self.conditioning = conditioning
        self.reference_name = reference
        self.trust_remote_code = trust_remote_code
        self.default_guidance = default_guidance
        rows = model.get_input_embeddings().weight.shape[0]
        if conditioning and (highest := max(conditioning.new_token_ids, default=-1)) >= rows:
            raise UserError(
                f"quark.json is damaged or belongs to another model: reward token id {highest} must be below {rows}, "
                "the number of embedding rows. Restore the file."
            )
        used_ids = 1 + max(tokenizer.get_vocab().values())  # Not the number of tokens: a vocabulary can have gaps.
        self.vocab_size = conditioning.vocab_size if conditioning else min(rows, used_ids)
        self.end_ids = eos_ids(model, tokenizer, self.vocab_size)
        self.steered_by = steered_by
        if steered_by is not None:
            self._check_steering(steered_by)
            self.default_guidance = STEERING

    def _check_steering(self, small: "QuarkGenerator") -> None:
        name, own_name = small.model.name_or_path, self.model.name_or_path
        if small.conditioning is None:
            raise UserError(f"steered_by {name!r}: must be a model that Quark trained. Name a run, or its final/.")
        if self.conditioning is not None:
            raise UserError(
                f"steered_by {name!r}: must steer a model without reward tokens, and Quark trained {own_name!r}. "
                "Leave it out, and set guidance_scale."
            )
        if not has_same_vocabulary(self, small) or self._encode_plain([_PROBE]) != small._encode_plain([_PROBE]):
            raise UserError(
                f"steered_by {name!r}: must have the tokenizer of {own_name!r}, and has {small.vocab_size:,} tokens "
                f"instead of {self.vocab_size:,}, or other ids. Train a small model of the same family."
            )

    @property
    def guide(self) -> "QuarkGenerator":
        """The model whose quantiles are requested: the one that steers this one, or this one."""
        return self.steered_by or self

    @property
    def context_length(self) -> int:
        """The maximum number of tokens that the model can process, and behind reward tokens the one that steers it."""
        own, small = context_length(self.model), self.steered_by
        return min(own, small.context_length - small.conditioning.max_length) if small and small.conditioning else own

    def longest_prompt(self, max_new_tokens: int) -> int:
        """Return the most tokens of a prompt, prefix included, that leave room for a completion."""
        own, small = longest_prompt(self.model, max_new_tokens), self.steered_by
        if not small or not small.conditioning:
            return own
        return min(own, small.longest_prompt(max_new_tokens) - small.conditioning.max_length)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        steered_by: str | os.PathLike | None = None,
        **model_kwargs: Any,
    ) -> "QuarkGenerator":
        """Load a run's `final/`, a checkpoint, or any causal or encoder–decoder language model.

        Args:
            path: a directory, a name on the hub, or "builtin" for the embedded model.
            revision: of a model on the hub: a commit, branch or tag.
            device: the device of the model; by default a GPU if there is one.
            trust_remote_code: run the Python code in the model's repository; by default no such code runs.
            system_prompt: the system message of chats without one; by default that of training.
            chat_template_kwargs: arguments of the chat template; by default those of training.
            steered_by: a smaller model with the same tokenizer that Quark trained. Guidance then steers by its
                quantiles, with γ = 2 by default.
            model_kwargs: arguments of `from_pretrained` of transformers, such as `dtype`.

        Raises:
            UserError: the model or its tokenizer cannot be loaded, or `steered_by` does not fit it.
        """
        path = locate_revision(locate_model(path), revision)
        model = load_model(path, trust_remote_code, **model_kwargs)
        reference = reference_name(path)
        tokenizer = load_tokenizer(path, trust_remote_code)
        tokenizer = with_chat_defaults(tokenizer, system_prompt, chat_template_kwargs)
        return cls(
            model.to(device or default_device()).eval(),
            tokenizer,
            Conditioning.load(path),
            reference,
            trust_remote_code,
            GuidanceOptions.load(path),
            None
            if steered_by is None
            else cls.from_pretrained(steered_by, device=device, trust_remote_code=trust_remote_code, dtype=model.dtype),
        )

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The model before training, p_0; loaded at first use.

        Raises:
            UserError: its name is not recorded, or it cannot be loaded.
        """
        if self.reference_name is None:
            raise UserError(
                "guidance_from 'reference': must name a known model, and quark.json names no reference. "
                "Set another guidance_from."
            )
        model = load_model(self.reference_name, self.trust_remote_code, dtype=self.model.dtype)
        return model.to(self.model.device).eval()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        quantile: str | int = "best",
        num_return_sequences: int = 1,
        seed: int | None = None,
        guidance_scale: GuidanceScale | None = None,
        guidance_from: str | int | None = None,
        guidance_rule: GuidanceRule | None = None,
        batch_size: int = 128,
        **generate_kwargs: Any,
    ) -> list[list[str]]:
        """Generate completions as text, without the prompt.

        Args:
            prompts: a text or a chat (a list of messages), or a list of texts and chats.
            quantile: "best", "worst", or 0 (worst) to K - 1 (best). One for each of several: "polite=best,short=0".
                A model without quantiles has only "best".
            num_return_sequences: completions per prompt, S.
            seed: makes the completions repeatable.
            guidance_scale: γ of `guidance`: 1 is without guidance, larger moves further from `guidance_from`. One
                for each of several rewards: "polite=2,short=1.5". By default, that of `default_guidance` for the best
                quantile, and 1 for others.
            guidance_from: the contrast: another quantile, or "reference" for the model before training.
            guidance_rule: "both" raises and lowers tokens; "lower" only lowers those that the contrast prefers.
            batch_size: completions per batch.
            generate_kwargs: the fields of `Sampling`: `max_new_tokens` (20), `min_new_tokens` (0),
                `temperature` (1.0), `top_p` (0.9), `do_sample` (True).

        Returns:
            For each prompt a list of S texts.

        Raises:
            UserError: an option is unknown or out of its limits, a prompt has no tokens or too many, or guidance has
                no contrast.
        """
        names = [field.name for field in fields(Sampling)]
        if unknown := [name for name in generate_kwargs if name not in names]:
            raise UserError(
                f"{unknown[0]}: must be one of {', '.join(names)}.{did_you_mean(unknown[0], names)}",
            )
        if num_return_sequences < 1:
            raise UserError(f"num_return_sequences {num_return_sequences}: must be at least 1.")
        sampling = Sampling(**generate_kwargs)
        prompts = cast(Sequence[Prompt], [prompts] if _is_one(prompts) else prompts)
        plain_ids = [ids for ids in self._encode_plain(prompts) for _ in range(num_return_sequences)]
        prompt_ids = [self.condition(ids, quantile) for ids in plain_ids]
        contrast = self.contrast(plain_ids, guidance_scale, guidance_from, quantile, guidance_rule)
        self._check_length(max(map(len, prompt_ids), default=0), sampling)
        completion_ids = self.complete(prompt_ids, sampling, seed=seed, batch_size=batch_size, contrast=contrast)
        texts = self.decode(plain_ids, completion_ids)
        return [texts[i : i + num_return_sequences] for i in range(0, len(texts), num_return_sequences)]

    def complete(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, **options: Any) -> list[list[int]]:
        """Sample one completion for each prompt; `options` are those of `sampler.complete`."""
        return complete(self.model, prompt_ids, sampling, end_ids=self.end_ids, vocab_size=self.vocab_size, **options)

    def stream(
        self,
        prompt: Prompt,
        quantile: str | int = "best",
        seed: Sequence[int] = (),
        guidance_scale: GuidanceScale | None = None,
        guidance_from: str | int | None = None,
        guidance_rule: GuidanceRule | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Yield one completion in pieces of text, as they are sampled.

        Args:
            prompt: a text or a chat.
            quantile, guidance_scale, guidance_from, guidance_rule: as in `generate`.
            seed: integers that make the completion repeatable.
            sampling: the sampling options; by default those of `generate`.

        Raises:
            UserError: as in `generate`.
        """
        sampling = sampling or Sampling()
        (plain_ids,) = self._encode_plain([prompt])
        prompt_ids = self.condition(plain_ids, quantile)
        self._check_length(len(prompt_ids), sampling)
        contrast = self.contrast([plain_ids], guidance_scale, guidance_from, quantile, guidance_rule)
        tokens = stream_tokens(
            self.model,
            prompt_ids,
            sampling,
            seed,
            end_ids=self.end_ids,
            vocab_size=self.vocab_size,
            contrast=contrast,
        )
        ids: list[int] = []
        written = ""
        for token in tokens:
            ids.append(token)
            (text,) = self.decode([plain_ids], [ids])
            # A token can end within a character, which the next token completes.
            if text.startswith(written) and not text.endswith("\ufffd"):
                yield text[len(written) :]
                written = text
        (text,) = self.decode([plain_ids], [ids])
        if text.startswith(written) and text != written:
            yield text[len(written) :]

    def _check_length(self, longest: int, sampling: Sampling) -> None:
        """Check that a prompt of this number of tokens and its completion fit into the context."""
        if longest <= self.longest_prompt(sampling.max_new_tokens):
            return
        if not self.is_encoder_decoder:
            raise UserError(
                f"max_new_tokens {sampling.max_new_tokens}: must be at most {max(0, self.context_length - longest)}, "
                f"because a prompt has {longest} tokens and the context length is {self.context_length}. "
                "Lower it, or shorten the prompt."
            )
        raise UserError(
            f"max_new_tokens {sampling.max_new_tokens}, and a prompt of {longest} tokens: must each fit into the "
            f"context length, {self.context_length}, which the decoder's start shares. Lower it, or shorten the prompt."
        )

    def encode(self, prompts: Sequence[Prompt], quantile: str | int = "best") -> list[list[int]]:
        """Encode prompts as token ids that start with the reward tokens of `quantile`, after BOS.

        Raises:
            UserError: there is no such quantile, a prompt has no tokens, or the chat template refuses it.
        """
        return [self.condition(ids, quantile) for ids in self._encode_plain(prompts)]

    def _encode_plain(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Encode prompts as token ids without reward tokens, which the tokenizer of a trained model adds."""
        empty_ids, _ = surrounding_ids(self.tokenizer)
        encoded = self.strip(prompts, encode_prompts(self.tokenizer, prompts, empty_ids=empty_ids))
        warn_of_second_bos(self.tokenizer, prompts, encoded)
        for prompt, ids in zip(prompts, encoded, strict=True):
            if not ids:
                raise UserError(f"prompt {shorten(prompt)}: must have at least one token. Use text to continue.")
        return encoded

    def strip(self, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Remove the reward tokens that the tokenizer of a trained model has put into prompts.

        Args:
            prompts: the prompts, for messages.
            prompt_ids: their token ids.

        Raises:
            UserError: a prompt has reward tokens of its own, or a BOS that the tokenizer puts behind reward tokens.
        """
        if self.conditioning is None:
            return [list(ids) for ids in prompt_ids]
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            if self.has_misplaced_reward_tokens(ids):
                raise UserError(
                    f"prompt {shorten(prompt)}: must not contain reward tokens or start with BOS. Remove them."
                )
        return [self.conditioning.strip(ids) for ids in prompt_ids]

    def has_misplaced_reward_tokens(self, ids: Sequence[int]) -> bool:
        """Return whether the ids of a prompt have reward tokens elsewhere than in training.

        That is the case for a prompt with reward tokens of its own, and for a text that starts with a BOS of chats.
        """
        conditioning = self.conditioning
        if conditioning is None or len(ids) == len(conditioning.strip(ids)):
            return False
        return not conditioning.is_prefixed(ids)

    def condition(self, plain_ids: Sequence[int], quantile: str | int = "best") -> list[int]:
        """Add the reward tokens of `quantile` to the token ids of a prompt, after BOS.

        Raises:
            UserError: there is no such quantile.
        """
        if self.conditioning is not None:
            return self.conditioning.prefix_named(plain_ids, quantile)
        if self.steered_by is not None:
            self.steered_by.condition(plain_ids, quantile)  # Fails for an unknown quantile.
        elif quantile != "best":
            raise UserError(
                f"quantile {quantile!r}: must be 'best', because Quark did not train this model. It has no quantiles."
            )
        return list(plain_ids)

    def contrast(
        self,
        plain_ids: Sequence[Sequence[int]],
        guidance_scale: GuidanceScale | None = None,
        guidance_from: str | int | None = None,
        quantile: str | int = "best",
        guidance_rule: GuidanceRule | None = None,
    ) -> Contrast | None:
        """Build the contrast of guidance for prompts; None without guidance.

        Args:
            plain_ids: token ids of the prompts, without reward tokens.
            quantile: the quantile of the wanted distribution.
            guidance_scale, guidance_from, guidance_rule: as in `generate`.

        Raises:
            UserError: there is no such quantile, it is the wanted one, the reference is not available, or the model has
                no reward tokens.
        """
        default, conditioning = self.default_guidance, self.guide.conditioning
        if guidance_scale is None:
            is_best = conditioning is None or conditioning.quantiles_of(quantile) == conditioning.best
            guidance_scale = default.guidance_scale if is_best or self.steered_by else 1.0
        if read_scale(guidance_scale) == 1:
            return None
        guidance_from = default.guidance_from if guidance_from is None else guidance_from
        if conditioning is None:
            raise UserError(
                f"guidance_from {guidance_from!r}: must be used with a model that Quark trained. "
                "This one has no quantiles."
            )
        guidance = GuidanceOptions(guidance_scale, guidance_from, guidance_rule or default.guidance_rule)
        reference = self.guide.reference if guidance_from == "reference" else None
        contrast = make_contrast(conditioning, plain_ids, guidance, quantile, reference)
        if self.steered_by is None:
            return contrast
        wanted = [self.guide.condition(ids, quantile) for ids in plain_ids]
        return replace(contrast, steering=(self.guide.model, wanted))

    def decode(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        keep_special_tokens: bool = False,
    ) -> list[str]:
        """Decode completions as text, without the prompts that they continue, and by default without special tokens."""
        ends = self.end_ids if keep_special_tokens else None
        return decode_completions(self.tokenizer, prompt_ids, completions, keep_special_tokens_before=ends)


def has_same_vocabulary(one: QuarkGenerator, other: QuarkGenerator) -> bool:
    """Return whether two models have the same tokens, with the same ids, in their original vocabularies."""
    first, second = (
        {token: i for token, i in generator.tokenizer.get_vocab().items() if i < generator.vocab_size}
        for generator in (one, other)
    )
    return first == second


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Return whether prompts are a single text or a single chat, and not a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
