"""Sampling: batches of token ids for the trainer, and `QuarkGenerator` for everyone else.

Whatever samples here, reward tokens cannot come out: they are conditions, not words.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quarkrl.errors import UserError
from quarkrl.models.conditioning import Conditioning
from quarkrl.models.head_access import is_sharded
from quarkrl.models.loading import context_length, eos_ids, first_line, load_model, load_tokenizer
from quarkrl.models.quark_json import reference_name
from quarkrl.sampling.decoder import Reader, Reading
from quarkrl.sampling.guidance import GuidedReading, checked_scale, contrast_to
from quarkrl.sampling.strategy import Sampling

Prompt: TypeAlias = str | list[dict[str, str]]

# Completions that have ended leave a batch when they are at least so many of it: leaving copies the others' cache.
_LEAST_SHARE_TO_DROP = 1 / 16


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: np.ndarray | None,
    *,
    end_ids: Sequence[int],
    vocab_size: int,
    guidance_scale: float = 1.0,
    contrast_ids: Sequence[Sequence[int]] | None = None,
    contrast_model: Reader | None = None,
) -> list[list[int]]:
    """One completion for each prompt.

    Args:
        model: any causal language model; it is put into eval mode while sampling and back afterwards.
        prompt_ids: token ids, reward tokens included where they are wanted; padded on the left here.
        sampling: how to draw.
        uniforms: from `sampling.uniforms`, a row for each prompt.
        end_ids: EOS ids. A completion ends with the first of them, which belongs to it.
        vocab_size: ids from here on are never sampled.
        guidance_scale: γ of `guidance`; 1 samples plainly, and costs nothing.
        contrast_ids: the prompts as the contrast reads them, such as behind the worst reward tokens. They are read in
            one batch with the prompts, of twice the size.
        contrast_model: reads them in place of `model`, in forward passes of its own.

    Returns:
        Token ids of the completions, exactly as sampled, EOS included, padding not.

    Raises:
        UserError: guidance without a contrast, or of an impossible scale.
    """
    device, room = model.device, sampling.max_new_tokens
    reading: Reading | GuidedReading
    if checked_scale(guidance_scale) == 1:
        reading = Reading.of(model, prompt_ids, device)
    elif contrast_ids is None:
        raise UserError(f"guidance_scale {guidance_scale} without contrast_ids: what to go away from is missing")
    else:
        contrast = contrast_ids, contrast_model
        reading = GuidedReading(guidance_scale, model, prompt_ids, *contrast, vocab_size, device)
    numbers = None if uniforms is None else torch.from_numpy(uniforms).to(device)
    ends = torch.tensor(end_ids, dtype=torch.long, device=device)
    written = torch.zeros(len(prompt_ids), room, dtype=torch.long, device=device)
    going = torch.arange(len(prompt_ids), device=device)  # The completions in the batch; some of them may have ended.
    ended = torch.zeros_like(going, dtype=torch.bool)
    with evaluating(model):
        logits = reading.begin()
        for step in range(room):
            scores = _possible(logits[:, :vocab_size].float(), ends if step < sampling.min_new_tokens else None)
            tokens = sampling.next_tokens(scores, None if numbers is None else numbers[going, step])
            written[going, step] = tokens
            ended |= torch.isin(tokens, ends)
            if step + 1 == room or (ended.all() and not is_sharded(model)):
                break
            if _LEAST_SHARE_TO_DROP * len(going) <= ended.sum() < len(going):
                rest = torch.nonzero(~ended)[:, 0]
                reading.keep(rest)
                tokens, going, ended = tokens[rest], going[rest], ended[rest]
            logits = reading.go_on(tokens)
    stops = set(end_ids)
    return [_until_end(row, stops) for row in written.tolist()]


def _possible(logits: Tensor, ruled_out: Tensor | None) -> Tensor:
    """Logits, -inf for the tokens that are ruled out.

    Raises:
        UserError: they are not finite, from which anything at all would be sampled.
    """
    if not logits.amax(-1).isfinite().all():
        raise UserError(
            "the model's logits are not finite: its weights are damaged, or float16 is too narrow for them; "
            "want a sound model, in bfloat16 or float32"
        )
    return logits if ruled_out is None else logits.index_fill(-1, ruled_out, -torch.inf)


def sample_best(
    policy: PreTrainedModel,
    conditioning: Conditioning,
    guidance: tuple[float, str | int, Reader],
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: np.ndarray | None,
    *,
    end_ids: Sequence[int],
) -> list[list[int]]:
    """`sample` for plain prompts: a policy on its best tokens, with guidance (scale, from what, the reference)."""
    guidance_scale, guidance_from, reference = guidance
    return sample(
        policy,
        [conditioning.prefix(ids, conditioning.best) for ids in prompt_ids],
        sampling,
        uniforms,
        end_ids=end_ids,
        vocab_size=conditioning.vocab_size,
        guidance_scale=guidance_scale,
        **contrast_to(conditioning, prompt_ids, guidance_from, reference),
    )


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode; each module is in the mode it was in afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def complete(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_ids: Sequence[int],
    vocab_size: int,
    seed: int | None = None,
    batch_size: int = 128,
    on_batch: Callable[[int], None] = lambda count: None,
    guidance_scale: float = 1.0,
    contrast_ids: Sequence[Sequence[int]] | None = None,
    contrast_model: Reader | None = None,
) -> list[list[int]]:
    """`sample` for any number of prompts: in batches of like length, given back in the order of the prompts.

    Args:
        seed: makes the result repeatable, whatever the batch size.
        batch_size: completions at a time.
        on_batch: called with the size of each batch that is done.
        guidance_scale, contrast_ids, contrast_model: guidance, as in `sample`.
    """
    uniforms = sampling.uniforms(len(prompt_ids), *(() if seed is None else (seed,)))
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    completions: list[list[int]] = [[]] * len(prompt_ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        numbers = None if uniforms is None else uniforms[rows]
        done = sample(
            model,
            [prompt_ids[row] for row in rows],
            sampling,
            numbers,
            end_ids=end_ids,
            vocab_size=vocab_size,
            guidance_scale=guidance_scale,
            contrast_ids=None if contrast_ids is None else [contrast_ids[row] for row in rows],
            contrast_model=contrast_model,
        )
        for row, ids in zip(rows, done, strict=True):
            completions[row] = ids
        on_batch(len(rows))
    return completions


class QuarkGenerator:
    """A model, asked for completions; one that Quark trained, for completions of any quantile.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        conditioning: its reward tokens; None for a model that has none.
        reference: the name or directory of the model it was trained from, which guidance may need.
        trust_remote_code: run the code that comes with the reference.

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
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.conditioning = conditioning
        self.reference_name = reference
        self.trust_remote_code = trust_remote_code
        self.end_ids = eos_ids(model, tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        if conditioning and max(map(max, conditioning.token_ids)) >= rows:
            raise UserError(
                f"quark.json is damaged, or another model's: its reward tokens are beyond the {rows} there are"
            )
        self.vocab_size = conditioning.vocab_size if conditioning else min(rows, len(tokenizer))

    @property
    def context_length(self) -> int:
        """The most tokens the model can read."""
        return context_length(self.model)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        **model_kwargs: Any,
    ) -> "QuarkGenerator":
        """Load a run's `final/`, a checkpoint, a hub name, or a plain model, which knows no quantiles.

        Args:
            path: where the model is.
            device: where it goes; a GPU if there is one.
            trust_remote_code: run the Python code that comes with it; without, none that it brings is run.
            model_kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

        Raises:
            UserError: there is no model, or no tokenizer.
        """
        model = load_model(path, trust_remote_code, **model_kwargs)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        reference = reference_name(path)
        tokenizer = load_tokenizer(path, trust_remote_code)
        return cls(model.to(device).eval(), tokenizer, Conditioning.load(path), reference, trust_remote_code)

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The model before training, p_0, loaded when first asked for.

        Raises:
            UserError: it is not known, or cannot be loaded.
        """
        if self.reference_name is None:
            raise UserError("guidance from the reference: it is not known which model this one was trained from")
        model = load_model(self.reference_name, self.trust_remote_code, dtype=self.model.dtype)
        return model.to(self.model.device).eval()

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        quantile: str | int = "best",
        num_return_sequences: int = 1,
        seed: int | None = None,
        guidance_scale: float = 1.0,
        guidance_from: str | int = "worst",
        batch_size: int = 128,
        **generate_kwargs: Any,
    ) -> list[list[str]]:
        """Completions as text, without the prompt.

        Args:
            prompts: a text, or a list of texts or chat messages.
            quantile: "best", "worst", or 0 (worst) to K - 1 (best); a plain model has only "best", itself.
            num_return_sequences: completions for each prompt, S.
            seed: makes the result repeatable.
            guidance_scale: γ of `guidance`: 1 is plain, more goes further from `guidance_from`, 0 ends there.
            guidance_from: another quantile, or "reference" for the model before training.
            batch_size: completions at a time.
            generate_kwargs: the fields of `Sampling`: `max_new_tokens` (20), `min_new_tokens` (0),
                `temperature` (1.0), `top_p` (0.9), `do_sample` (True).

        Returns:
            A list for each prompt, of S texts.

        Raises:
            UserError: no such quantile, an unknown option, an empty prompt, guidance from the quantile asked for.
        """
        options = [field.name for field in fields(Sampling)]
        if unknown := [name for name in generate_kwargs if name not in options]:
            raise UserError(f"unknown option {unknown[0]!r}: want {', '.join(options)}")
        if num_return_sequences < 1:
            raise UserError(f"num_return_sequences {num_return_sequences}: want at least 1")
        sampling = Sampling(**generate_kwargs)
        texts = [prompts] if isinstance(prompts, str) else prompts
        plain = [row for row in self._plain(texts) for _ in range(num_return_sequences)]
        ids = [self.condition(row, quantile) for row in plain]
        guidance = {} if checked_scale(guidance_scale) == 1 else self.contrast(plain, guidance_from)
        if ids and guidance.get("contrast_ids") == ids:
            raise UserError(f"guidance_from {guidance_from!r} is the quantile asked for: want another one")
        longest, room = max(map(len, ids), default=0), self.context_length - sampling.max_new_tokens
        if longest > room:
            raise UserError(f"a prompt has {longest} tokens, the model has room for {room} beside the completion")
        done = complete(
            self.model,
            ids,
            sampling,
            end_ids=self.end_ids,
            vocab_size=self.vocab_size,
            seed=seed,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            **guidance,
        )
        completions = self.decode(done)
        return [completions[i : i + num_return_sequences] for i in range(0, len(completions), num_return_sequences)]

    def encode(self, prompts: Sequence[Prompt], quantile: str | int = "best") -> list[list[int]]:
        """Token ids of the prompts, with the reward tokens of `quantile` in front."""
        return [self.condition(ids, quantile) for ids in self._plain(prompts)]

    def _plain(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the prompts, without reward tokens."""
        encoded = []
        for prompt in prompts:
            if isinstance(prompt, str):
                # An EOS that the tokenizer puts behind a text is taken off, since a completion goes on from there.
                tokens = self.tokenizer(prompt, return_special_tokens_mask=True)
                ids, added = tokens["input_ids"], tokens["special_tokens_mask"]
                ids = ids[:-1] if ids and added[-1] and ids[-1] == self.tokenizer.eos_token_id else ids
            else:
                ids = self._chat_ids(prompt)
            encoded.append(self.conditioning.strip(ids) if self.conditioning else list(ids))
            if not encoded[-1]:
                raise UserError(f"prompt {prompt!r} has no tokens: want some text to continue")
        return encoded

    def _chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except (TemplateError, TypeError, ValueError) as error:  # ValueError: there is none
            raise UserError(
                f"the chat template refuses {messages!r} ({first_line(error)}): want text as prompt"
            ) from error

    def condition(self, plain_ids: Sequence[int], quantile: str | int = "best") -> list[int]:
        """A prompt's plain token ids with the reward tokens of `quantile` in front."""
        if self.conditioning is not None:
            return self.conditioning.prefix(plain_ids, self.conditioning.quantiles_of(quantile))
        if quantile != "best":
            raise UserError(f"quantile {quantile!r}: this model was not trained by Quark and has no quantiles")
        return list(plain_ids)

    def contrast(self, plain_ids: Sequence[Sequence[int]], guidance_from: str | int = "worst") -> dict[str, Any]:
        """What `complete` wants to know for guidance beside its scale (`guidance.contrast_to`).

        Raises:
            UserError: no such quantile, no reference, or a model without reward tokens.
        """
        if self.conditioning is None:
            raise UserError(f"guidance from {guidance_from!r}: this model was not trained by Quark; want one that was")
        reference = self.reference if guidance_from == "reference" else self.model
        return contrast_to(self.conditioning, plain_ids, guidance_from, reference)

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Texts of completions, without special tokens."""
        return decode(self.tokenizer, completions)


def decode(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Sequence[int]]) -> list[str]:
    """Texts for rewards and people: without special tokens, otherwise as the model wrote them."""
    return tokenizer.batch_decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False)
