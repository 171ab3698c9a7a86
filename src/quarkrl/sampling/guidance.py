"""Guidance: sample each token from the contrast of two distributions, the wanted one and another.

    log p_wanted  +  Σ_i (γ_i - 1) (log p_wanted  -  log p_contrast_i)

There usually is one contrast. Where several rewards condition, each attribute i can have its own γ_i. Its contrast then
differs from the wanted quantiles in attribute i alone. Sums of this form are the conjunction of Liu et al. (2022, arXiv
2206.01714).

This is computed over the original vocabulary, before temperature and nucleus. γ = 1 is the wanted distribution, γ = 0
the contrast, and γ > 1 moves further away from the contrast. This is classifier-free guidance (Sanchez et al. 2023,
arXiv 2306.17806). Here the wanted distribution is the policy with the best reward token; the contrast is the policy
with another reward token, or the reference.

The difference raises tokens that the contrast avoids, and lowers those that it prefers. The rule `lower` only does the
second: the difference counts where it is negative. Then no unlikely token becomes likely, and perplexity stays lower.
Self-debiasing (Schick et al. 2021, arXiv 2103.00453) scales the same tokens, by another formula.

A small policy can also steer another, larger model of the same vocabulary, which stays as it is:

    log p_larger  +  Σ_i (γ_i - 1) (log p_wanted  -  log p_contrast_i)

With the worst quantile as contrast, these are the experts of DExperts (Liu et al. 2021, arXiv 2105.03023). With the
reference, it is proxy-tuning (Liu et al. 2024, arXiv 2401.08565) with α = γ - 1.

`sampler.sample` computes both in one batch with one cache (`GuidedDecoder`). `Guidance` does the same in plain
`generate`:

    model, tokenizer = AutoModelForCausalLM.from_pretrained("run/final"), AutoTokenizer.from_pretrained("run/final")
    inputs = tokenizer(["You are", "The new neighbour is"], return_tensors="pt", padding=True, padding_side="left")
    guidance = Guidance.between(model, Conditioning.load("run/final"), **inputs, guidance_scale=2.0)
    model.generate(**inputs, logits_processor=[guidance], do_sample=True, top_p=0.9)
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from quarkrl.errors import UserError
from quarkrl.models.batching import left_pad
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.encoder_decoder import decoder_start_ids, is_encoder_decoder
from quarkrl.models.quark_json import DEFAULT_GUIDANCE, damaged, read_quark_json
from quarkrl.sampling.decoder import CachedDecoder, ModelSource
from quarkrl.sampling.options import GuidanceRule, GuidanceScale, check_attributes, read_number, read_scale


class GuidanceOptions(NamedTuple):
    """Guidance as a user requests it, or as a model records it.

    `quarkrl evaluate --target … --save_guidance` records it in `quark.json`. `QuarkGenerator` uses the record unless a
    call says otherwise.

    Attributes:
        guidance_scale: γ; 1 is without guidance; "NAME=γ,NAME=γ" for one of each attribute.
        guidance_from: the quantile of the contrast, "worst", "best" or a number; or "reference".
        guidance_rule: both, or lower.
    """

    guidance_scale: GuidanceScale = 1.0
    guidance_from: str | int = "worst"
    guidance_rule: GuidanceRule = "both"

    @classmethod
    def load(cls, model: str | os.PathLike) -> "GuidanceOptions":
        """Read what a model records; without a record, guidance is off.

        Raises:
            UserError: `quark.json` is damaged.
        """
        recorded = (read_quark_json(model) or {}).get(DEFAULT_GUIDANCE) or {}
        try:
            guidance = cls(**{name: recorded[name] for name in cls._fields if name in recorded})
            read_scale(guidance.guidance_scale)
        except (TypeError, UserError) as error:
            raise damaged(model, f"{DEFAULT_GUIDANCE} {recorded!r}") from error
        return guidance


@dataclass(frozen=True)
class Contrast:
    """The other distribution of guidance, for a batch of n prompts; or m of them, one for each guided attribute.

    Attributes:
        guidance_scale: γ, or m of them; 1 is without guidance, and the contrast is not computed.
        prompt_ids: token ids of the n prompts, as the contrast model gets them; m · n, contrast after contrast.
        model: the contrast model; None for the model of the wanted distribution, which then processes all in one batch.
        rule: both, or lower.
        steering: the model of the wanted distribution and the n prompts as it gets them, if it is not the model that
            samples, but steers that.

    Raises:
        UserError: γ is negative or not finite, or there is no such rule.
    """

    guidance_scale: float | tuple[float, ...]
    prompt_ids: Sequence[Sequence[int]]
    model: ModelSource | None = None
    rule: GuidanceRule = "both"
    steering: tuple[ModelSource, Sequence[Sequence[int]]] | None = None

    def __post_init__(self) -> None:
        for scale in self.scales:
            read_number(scale, scale, "guidance_scale")
        check_guidance_rule(self.rule)

    @property
    def scales(self) -> tuple[float, ...]:
        """γ of each of the m contrasts."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)

    @property
    def is_off(self) -> bool:
        """Whether no contrast counts."""
        return all(scale == 1 for scale in self.scales)

    def select(self, rows: Sequence[int]) -> "Contrast":
        """Return the contrast for a part of the batch."""
        count = len(self.prompt_ids) // max(len(self.scales), 1)
        starts = range(0, count * len(self.scales), count) if count else ()
        prompt_ids = [self.prompt_ids[start + row] for start in starts for row in rows]
        steering = self.steering and (self.steering[0], [self.steering[1][row] for row in rows])
        return replace(self, prompt_ids=prompt_ids, steering=steering)


def check_guidance_rule(rule: str) -> None:
    """Check the rule.

    Raises:
        UserError: there is no such rule.
    """
    if rule not in get_args(GuidanceRule):
        raise UserError(f"guidance_rule {rule!r}: must be {' or '.join(get_args(GuidanceRule))}.")


def make_contrast(
    conditioning: Conditioning,
    plain_ids: Sequence[Sequence[int]],
    options: GuidanceOptions,
    quantile: str | int = "best",
    reference: ModelSource | None = None,
) -> Contrast:
    """Build the contrast for prompts of a policy.

    Args:
        conditioning: the policy's reward tokens.
        plain_ids: token ids of the prompts, without reward tokens.
        options: γ, and what to move away from.
        quantile: the quantile of the wanted distribution.
        reference: the model before training.

    Raises:
        UserError: there is no such quantile or attribute, the quantile is the wanted one, or γ is negative or not
            finite.
    """
    text, guidance_from, rule = options
    scale = read_scale(text)
    check_attributes(text, conditioning.attributes)
    if guidance_from == "reference":
        if isinstance(scale, dict):
            raise UserError(
                f"guidance_scale {text!r}: must be one number if guidance is from the reference, which has no "
                "quantiles. Set --guidance_from worst."
            )
        return Contrast(scale, [list(ids) for ids in plain_ids], reference, rule)
    wanted, others = conditioning.quantiles_of(quantile), conditioning.quantiles_of(guidance_from)
    if not isinstance(scale, dict):
        if wanted == others:
            raise _no_contrast(guidance_from, f"quantile {quantile!r}")
        return Contrast(scale, [conditioning.prefix(ids, others) for ids in plain_ids], rule=rule)
    # Each contrast differs from the wanted quantiles in its attribute alone.
    guided = [(a, scale[name]) for a, name in enumerate(conditioning.attributes) if scale.get(name, 1.0) != 1]
    prompt_ids: list[list[int]] = []
    for a, _ in guided:
        if wanted[a] == others[a]:
            place = f"quantile {quantile!r} in {conditioning.attributes[a]}"
            raise _no_contrast(guidance_from, place, "Leave it out of guidance_scale.")
        prompt_ids += [conditioning.prefix(ids, (*wanted[:a], others[a], *wanted[a + 1 :])) for ids in plain_ids]
    return Contrast(tuple(number for _, number in guided), prompt_ids, rule=rule)


def find_contrast(conditioning: Conditioning | None, prompt_ids: Sequence[int], options: GuidanceOptions) -> Contrast:
    """Build the contrast for one prompt that has its reward tokens.

    Args:
        conditioning: the reward tokens of the model; None if it has none.
        prompt_ids: the prompt, as the tokenizer of the model encodes it.
        options: γ, and the quantile to move away from.

    Raises:
        UserError: the model or the prompt has no reward tokens, or the quantile is unknown or that of the prompt.
    """
    if conditioning is None:
        raise UserError("guidance_scale: must be used with a model that Quark trained. This one has no quark.json.")
    quantiles = conditioning.quantiles_in(prompt_ids)
    if quantiles is None:
        raise _no_reward_tokens()
    wanted = ",".join(f"{name}={i}" for name, i in zip(conditioning.attributes, quantiles, strict=True))
    return make_contrast(conditioning, [conditioning.strip(prompt_ids)], options, wanted)


def contrast_prompts(
    conditioning: Conditioning, prompt_ids: Sequence[Sequence[int]], guidance_from: str | int
) -> list[list[int]]:
    """Return prompts with the reward tokens of another quantile in place of their own.

    Args:
        conditioning: the reward tokens of the model.
        prompt_ids: prompts that start with reward tokens, as the tokenizer of the model encodes them.
        guidance_from: the other quantile: "worst", "best", or 0 (worst) to K - 1 (best).

    Raises:
        UserError: there is no such quantile, a prompt has no reward tokens, or all prompts request that quantile.
    """
    prompts = [list(ids) for ids in prompt_ids]
    if not all(map(conditioning.is_prefixed, prompts)):
        raise _no_reward_tokens()
    contrasts = [conditioning.prefix_named(conditioning.strip(ids), guidance_from) for ids in prompts]
    if contrasts == prompts:
        raise _no_contrast(guidance_from, "the quantile of the prompts")
    return contrasts


def _no_reward_tokens() -> UserError:
    return UserError(
        "guidance_scale: must be used with prompts that start with reward tokens. Send text, and let the model's own "
        "tokenizer encode it."
    )


def _no_contrast(guidance_from: str | int, wanted: str, remedy: str = "The default is worst.") -> UserError:
    return UserError(f"guidance_from {guidance_from!r}: must differ from {wanted}. {remedy}")


def guided_logits(
    wanted: Tensor,
    contrasts: Sequence[Tensor],
    scales: Sequence[float | Tensor],
    rule: GuidanceRule = "both",
    vocab_size: int | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Combine the logits of a distribution and its contrasts by the formula of this module.

    Args:
        wanted: `(batch, vocab)` logits; -inf for a token that is ruled out.
        contrasts: m times `(batch, vocab)` logits of the same tokens.
        scales: m times γ, one for all or `(batch, 1)`.
        rule: both, or lower.
        vocab_size: tokens with ids from here on, such as reward tokens, are left out.
        base: `(batch, vocab)` logits of a larger model that is steered; by default `wanted`.

    Returns:
        `(batch, vocab_size)` logits in float32, -inf where `wanted` or `base` is.
    """
    wanted = wanted[:, :vocab_size].float().log_softmax(-1)
    logits = wanted.clone() if base is None else base[:, :vocab_size].float().log_softmax(-1)
    ruled_out = (wanted == -torch.inf) | (logits == -torch.inf)
    for contrast, scale in zip(contrasts, scales, strict=True):
        difference = wanted - contrast[:, :vocab_size].float().log_softmax(-1)
        # In place, because each of these arrays is as large as the logits of the batch.
        logits += (difference if rule == "both" else difference.clamp_(max=0)).mul_(scale - 1)
    # A token is usually ruled out on both sides (EOS before min_new_tokens), and -inf minus -inf is NaN.
    return logits.masked_fill_(ruled_out, -torch.inf)


def make_decoder(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    contrast: Contrast | None,
    vocab_size: int,
    decoder: Callable[..., CachedDecoder] = CachedDecoder.for_prompts,
) -> "CachedDecoder | GuidedDecoder":
    """Return what decodes prompts, with guidance if there is any; see `GuidedDecoder`."""
    if contrast is None or contrast.is_off:
        return decoder(model, prompt_ids, model.device)
    return GuidedDecoder(model, prompt_ids, contrast, vocab_size, decoder)


class GuidedDecoder:
    """A `CachedDecoder` whose logits are guided.

    Args:
        model: the model of the wanted distribution, or the one that it steers.
        prompt_ids: token ids of n prompts, as `model` gets them.
        contrast: the contrast for the same prompts. Without a model of its own, it shares a batch of (1 + m) n rows
            with the wanted distribution.
        vocab_size: size of the original vocabulary.
        make_decoder: creates a decoder for a model, prompts and a device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        contrast: Contrast,
        vocab_size: int,
        make_decoder: Callable[..., CachedDecoder] = CachedDecoder.for_prompts,
    ):
        self._scales, self._rule = contrast.scales, contrast.rule
        self._vocab_size = vocab_size
        batches: list[tuple[ModelSource, Sequence[Sequence[int]]]] = [(model, prompt_ids)]
        if contrast.steering:
            batches.append(contrast.steering)
        if contrast.model is None:
            source, ids = batches.pop()
            batches.append((source, [*ids, *contrast.prompt_ids]))
        else:
            batches.append((contrast.model, contrast.prompt_ids))
        self._is_steered = contrast.steering is not None
        self._parts = [len(ids) // len(prompt_ids) for _, ids in batches]  # The distributions of each decoder.
        self._decoders = [make_decoder(source, ids, model.device) for source, ids in batches]

    @property
    def min_share_to_remove(self) -> float:
        """The share of ended completions from which on they are removed."""
        return self._decoders[0].min_share_to_remove

    def prefill(self) -> Tensor:
        """Process the prompts; return the `(n, vocab_size)` guided logits of the first new token."""
        return self._guide([decoder.prefill() for decoder in self._decoders])

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each completion, `(n,)`; return the `(n, vocab_size)` guided logits of the next token."""
        pairs = zip(self._decoders, self._parts, strict=True)
        return self._guide([decoder.step(tokens.repeat(parts)) for decoder, parts in pairs])

    def select(self, rows: Tensor) -> None:
        """Replace the batch by the completions with these indices."""
        for decoder, parts in zip(self._decoders, self._parts, strict=True):
            size = decoder.batch_size // parts
            decoder.select(torch.cat([rows + part * size for part in range(parts)]))

    def _guide(self, logits: list[Tensor]) -> Tensor:
        sides = [side for rows, parts in zip(logits, self._parts, strict=True) for side in rows.chunk(parts)]
        base = sides.pop(0) if self._is_steered else None
        wanted, *contrasts = sides
        return guided_logits(wanted, contrasts, self._scales, self._rule, self._vocab_size, base)


class Guidance(LogitsProcessor):
    """Guidance for plain `generate`, sampling or greedy. The contrast has its own forward pass and cache.

    An object serves one call of `generate`. Unlike transformers' `UnbatchedClassifierFreeGuidanceLogitsProcessor`, it
    supports left-padded prompts, and it rules out tokens beyond the original vocabulary.

    Args:
        guidance_scale: γ; 1 leaves the scores unchanged.
        model: the contrast model: the model that generates, or another one with the same tokens.
        contrast_ids: `(batch, length)` the prompts as the contrast model gets them, padded on the left. `generate` may
            make several completions of each (`num_return_sequences`), but beam search is not supported.
        contrast_mask: `(batch, length)`, 1 = counts; all ones by default.
        vocab_size: tokens with ids from here on, such as reward tokens, are ruled out. The default is the smaller
            vocabulary of the two models.
        rule: both, or lower.

    Raises:
        UserError: γ is negative or not finite, or a decoder has a forced first token; when called, a second `generate`,
            or one with beam search.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: ModelSource,
        contrast_ids: Tensor,
        contrast_mask: Tensor | None = None,
        vocab_size: int | None = None,
        rule: GuidanceRule = "both",
    ):
        if isinstance(model, torch.nn.Module) and is_encoder_decoder(model) and len(decoder_start_ids(model)) > 1:
            raise UserError(
                "guidance: must be that of QuarkGenerator where the generation config forces a first token "
                "(forced_bos_token_id). Use QuarkGenerator."
            )
        self.rule = rule
        self.guidance_scale = read_number(guidance_scale, guidance_scale, "guidance_scale")
        self.model = model
        self.vocab_size = vocab_size
        self._prompts = contrast_ids, torch.ones_like(contrast_ids) if contrast_mask is None else contrast_mask
        self._decoder: CachedDecoder | None = None
        self._previous_ids: Tensor | None = None  # The `input_ids` of the previous call.

    @classmethod
    def between(
        cls,
        model: PreTrainedModel,
        conditioning: Conditioning,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        guidance_scale: float,
        guidance_from: str | int = "worst",
        rule: GuidanceRule = "both",
    ) -> "Guidance":
        """Create guidance for a model that Quark trained, away from one of its quantiles.

        Args:
            model: the model that generates.
            conditioning: its reward tokens (`Conditioning.load`).
            input_ids: `(batch, length)` the input of `generate`: prompts that start with reward tokens, as the
                tokenizer in `final/` encodes them.
            attention_mask: `(batch, length)`, the other input of `generate`.
            guidance_scale: γ.
            guidance_from: the quantile to move away from: "worst", "best", or 0 (worst) to K - 1 (best).
            rule: both, or lower.

        Raises:
            UserError: there is no such quantile, a prompt has no reward tokens, or all prompts request that quantile.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[counts.bool()].tolist() for ids, counts in zip(input_ids, mask, strict=True)]
        contrasts = contrast_prompts(conditioning, prompts, guidance_from)
        contrast_ids, contrast_mask = left_pad(contrasts, input_ids.device)
        return cls(guidance_scale, model, contrast_ids, contrast_mask, conditioning.vocab_size, rule)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the guided scores, `(batch, vocab)`, of the next token."""
        if self.guidance_scale == 1:
            return scores
        contrast = self._contrast_logits(input_ids).to(scores)  # (batch, vocab of the contrast model)
        width = self.vocab_size or min(scores.shape[-1], contrast.shape[-1])
        result = torch.full_like(scores, -torch.inf)
        result[:, :width] = guided_logits(scores, [contrast], [self.guidance_scale], self.rule, width)
        return result

    def _contrast_logits(self, input_ids: Tensor) -> Tensor:
        previous_ids, self._previous_ids = self._previous_ids, input_ids
        if self._decoder is None:
            ids, mask = (tensor.to(input_ids.device) for tensor in self._prompts)
            prompt_of_row = torch.arange(len(ids), device=ids.device).repeat_interleave(len(input_ids) // len(ids))
            self._decoder = CachedDecoder(self.model, ids, mask, prompt_of_row)
            return self._decoder.prefill()
        if previous_ids is None or not torch.equal(input_ids[:, :-1], previous_ids):
            raise UserError(
                "guidance: must serve one call of generate without beam search. Create a Guidance object for each call."
            )
        return self._decoder.step(input_ids[:, -1])
