"""Guidance: each token from a contrast of two distributions, what is wanted and what is not.

    log p_wanted  +  (γ - 1) (log p_wanted  -  log p_contrast)

over the original vocabulary, before temperature and nucleus. γ = 1 is the wanted distribution, γ = 0 the contrast, and
beyond 1 lies what the difference between the two points to. This is classifier-free guidance (Sanchez et al. 2023,
arXiv 2306.17806); here the wanted distribution is the policy on the best reward token, and the contrast the policy on
the worst, or the reference.

`generation.sample` runs both in one batch with one cache (`GuidedReading`). In plain `generate`, `Guidance` does it:

    model, tokenizer = AutoModelForCausalLM.from_pretrained("run/final"), AutoTokenizer.from_pretrained("run/final")
    inputs = tokenizer(["You are", "The new neighbour is"], return_tensors="pt", padding=True, padding_side="left")
    guidance = Guidance.between(model, Conditioning.load("run/final"), **inputs, guidance_scale=2.0)
    model.generate(**inputs, logits_processor=[guidance], do_sample=True, top_p=0.9)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.sampling.decoder import Reader, Reading


def checked_scale(guidance_scale: float, name: str = "guidance_scale") -> float:
    """The scale.

    Raises:
        UserError: it is negative or not finite.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise UserError(f"{name} {guidance_scale}: want a number from 0 (the contrast alone); 1 does nothing")
    return guidance_scale


def guided(wanted: Tensor, contrast: Tensor, guidance_scale: float) -> Tensor:
    """The contrast of two distributions (the module's formula).

    Args:
        wanted, contrast: `(batch, vocab)` logits of the same tokens; -inf for a token that cannot come.
        guidance_scale: γ.

    Returns:
        `(batch, vocab)` logits, -inf where `wanted` is.
    """
    wanted, contrast = wanted.log_softmax(-1), contrast.log_softmax(-1)
    logits = wanted + (guidance_scale - 1) * (wanted - contrast)
    # Such a token is most often ruled out on both sides (EOS before its time), and -inf less -inf is not a number.
    return logits.masked_fill(wanted == -torch.inf, -torch.inf)


def contrast_to(
    conditioning: Conditioning, plain_ids: Sequence[Sequence[int]], guidance_from: str | int, reference: Reader
) -> dict[str, Any]:
    """What `generation.sample` and `complete` want to know for guidance beside its scale.

    Args:
        conditioning: the policy's reward tokens.
        plain_ids: prompts without them.
        guidance_from: a quantile, read by the policy itself, or "reference".
        reference: the model that reads the plain prompts then.

    Returns:
        `contrast_ids`, and for the reference `contrast_model`.

    Raises:
        UserError: no such quantile.
    """
    if guidance_from == "reference":
        return {"contrast_ids": [list(ids) for ids in plain_ids], "contrast_model": reference}
    quantiles = conditioning.quantiles_of(guidance_from)
    return {"contrast_ids": [conditioning.prefix(ids, quantiles) for ids in plain_ids]}


class GuidedReading:
    """A `Reading` whose logits are guided.

    Args:
        guidance_scale: γ.
        model: reads the texts as wanted.
        wanted, contrast: `n` token ids each: a text as wanted, and as the contrast reads it.
        contrast_model: reads the contrasts; by default `model`, in one batch of 2n with the wanted.
        vocab_size: of the original vocabulary.
        device: of the models.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: PreTrainedModel,
        wanted: Sequence[Sequence[int]],
        contrast: Sequence[Sequence[int]],
        contrast_model: Reader | None,
        vocab_size: int,
        device: torch.device,
    ):
        self.guidance_scale = checked_scale(guidance_scale)
        self.vocab_size = vocab_size
        if contrast_model is None:
            self._readings = [Reading.of(model, [*wanted, *contrast], device)]
        else:
            self._readings = [Reading.of(model, wanted, device), Reading.of(contrast_model, contrast, device)]
        self._paired = contrast_model is None

    def begin(self) -> Tensor:
        """As `Reading.begin`: `(n, vocab_size)`."""
        return self._guided([reading.begin() for reading in self._readings])

    def go_on(self, tokens: Tensor) -> Tensor:
        """As `Reading.go_on`: `(n, vocab_size)`."""
        tokens = tokens.repeat(2) if self._paired else tokens
        return self._guided([reading.go_on(tokens) for reading in self._readings])

    def keep(self, rows: Tensor) -> None:
        """As `Reading.keep`."""
        if self._paired:
            rows = torch.cat((rows, rows + self._readings[0].batch_size // 2))
        for reading in self._readings:
            reading.keep(rows)

    def _guided(self, logits: list[Tensor]) -> Tensor:
        (wanted, contrast) = logits[0].chunk(2) if self._paired else logits
        wanted, contrast = (each[:, : self.vocab_size].float() for each in (wanted, contrast))
        return guided(wanted, contrast, self.guidance_scale)


class Guidance(LogitsProcessor):
    """Guidance for any `generate`, sampling or greedy: the contrast has a forward pass and a cache of its own.

    One is good for one call of `generate`. Unlike transformers' `UnbatchedClassifierFreeGuidanceLogitsProcessor` it
    reads left-padded contrasts at their right positions, and keeps to the original vocabulary.

    Args:
        guidance_scale: γ; 1 leaves the scores as they are.
        model: reads the contrast; the model that generates, or another of the same tokens, such as the reference.
        contrast_ids: `(batch, length)` the prompts as the contrast reads them, padded on the left. `generate` may
            make several completions of each (`num_return_sequences`), but no beams.
        contrast_mask: `(batch, length)`, 1 = counts; all of them if left out.
        vocab_size: ids from here on, such as reward tokens, become impossible; by default those that the two models
            do not share.

    Raises:
        UserError: an impossible scale; when called, a second `generate`, or one with beams.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Reader,
        contrast_ids: Tensor,
        contrast_mask: Tensor | None = None,
        vocab_size: int | None = None,
    ):
        self.guidance_scale = checked_scale(guidance_scale)
        self.model = model
        self.vocab_size = vocab_size
        self._beginnings = contrast_ids, torch.ones_like(contrast_ids) if contrast_mask is None else contrast_mask
        self._reading: Reading | None = None
        self._read: Tensor | None = None  # What `generate` had written when it last asked.

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
    ) -> "Guidance":
        """Guidance of a model that Quark trained, away from one of its quantiles.

        Args:
            model: the model that generates.
            conditioning: its reward tokens (`Conditioning.load`).
            input_ids: `(batch, length)` what `generate` is given: prompts with reward tokens in front, as the
                tokenizer in `final/` puts them.
            attention_mask: `(batch, length)`, likewise.
            guidance_scale: γ.
            guidance_from: the quantile to go away from: "worst", "best", or 0 (worst) to K - 1 (best).

        Raises:
            UserError: no such quantile, or a prompt without reward tokens.
        """
        contrast_ids = input_ids.clone()
        for tokens, quantile in zip(conditioning.token_ids, conditioning.quantiles_of(guidance_from), strict=True):
            found = torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))
            if not found.any(dim=1).all():
                raise UserError("a prompt has no reward tokens: want input_ids from the tokenizer beside the model")
            contrast_ids[found] = tokens[quantile]
        return cls(guidance_scale, model, contrast_ids, attention_mask, conditioning.vocab_size)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return scores
        contrast = self._contrast(input_ids).to(scores)  # (batch, vocab of the contrast's model)
        width = self.vocab_size or min(scores.shape[-1], contrast.shape[-1])
        result = torch.full_like(scores, -torch.inf)
        result[:, :width] = guided(scores[:, :width], contrast[:, :width], self.guidance_scale)
        return result

    def _contrast(self, input_ids: Tensor) -> Tensor:
        """Logits of the contrast for the next token."""
        read, self._read = self._read, input_ids
        if self._reading is None:
            ids, mask = (tensor.to(input_ids.device) for tensor in self._beginnings)
            parts = torch.arange(len(ids), device=ids.device).repeat_interleave(len(input_ids) // len(ids))
            self._reading = Reading(self.model, ids, mask, parts)
            return self._reading.begin()
        if read is None or not torch.equal(input_ids[:, :-1], read):
            raise UserError("guidance goes with one generate without beams: make a new Guidance for each call")
        return self._reading.go_on(input_ids[:, -1])
