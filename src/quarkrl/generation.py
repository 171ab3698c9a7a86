"""Sampling: batches of token ids for the trainer, and `QuarkGenerator` for everyone else.

Whatever samples here, reward tokens cannot come out: they are conditions, not words.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from quarkrl.conditioning import Conditioning
from quarkrl.errors import UserError
from quarkrl.loading import context_length, eos_ids, load_model, load_tokenizer


class OriginalVocabulary(LogitsProcessor):
    """Leaves only the first `vocab_size` token ids possible: no reward token, no row that merely pads the embedding."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class InverseTransform(LogitsProcessor):
    """Draws the next token by inverse transform sampling, and leaves only it possible.

    A completion then depends on its own uniform numbers alone, not on the batch it is sampled in, and one number per
    token is drawn where `torch.multinomial` draws one per token and vocabulary entry (a third of the time of sampling
    from a 6M-parameter model).

    Args:
        uniforms: `(batch, steps)`, in [0, 1).
    """

    def __init__(self, uniforms: Tensor):
        self.uniforms = uniforms
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulated = scores.softmax(-1, dtype=torch.float32).cumsum(-1)  # (batch, vocab)
        total = cumulated[:, -1:]
        # Below the total even after rounding, so that no token of probability 0 is ever reached.
        threshold = torch.minimum(
            self.uniforms[:, self.step, None] * total, torch.nextafter(total, torch.zeros_like(total))
        )
        self.step += 1
        chosen = torch.searchsorted(cumulated, threshold, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0.0)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; the whole of it, a model's own `generation_config` adds nothing.

    Attributes:
        max_new_tokens: tokens of a completion, EOS included; at least 1.
        min_new_tokens: EOS is not among the first so many.
        temperature: divides the logits; above 0.
        top_p: nucleus, in (0, 1]; 1 keeps all.
        do_sample: False for greedy decoding.

    Raises:
        UserError: a value is impossible.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 0.9
    do_sample: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: want at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min_new_tokens {self.min_new_tokens}: want 0 to max_new_tokens, {self.max_new_tokens}")
        if not self.temperature > 0:
            raise UserError(f"temperature {self.temperature}: want more than 0 (do_sample=False decodes greedily)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: want more than 0 and at most 1")

    def uniforms(self, count: int, *seed: int) -> np.ndarray | None:
        """`(count, max_new_tokens)` random numbers for so many completions; a completion is settled by its row."""
        if not self.do_sample:
            return None
        return np.random.default_rng(seed or None).random((count, self.max_new_tokens), dtype=np.float32)

    def processors(self, vocab_size: int, uniforms: Tensor | None) -> LogitsProcessorList:
        """What turns a step's logits into its choice."""
        processors = LogitsProcessorList([OriginalVocabulary(vocab_size)])
        if uniforms is not None:
            if self.temperature != 1:
                processors.append(TemperatureLogitsWarper(self.temperature))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
            processors.append(InverseTransform(uniforms))
        return processors


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    uniforms: np.ndarray | None,
    *,
    end_ids: Sequence[int],
    vocab_size: int,
) -> list[list[int]]:
    """One completion for each prompt.

    Args:
        model: any causal language model; it is put into eval mode while sampling and back afterwards.
        prompt_ids: token ids, reward tokens included where they are wanted; padded on the left here.
        sampling: how to draw.
        uniforms: from `sampling.uniforms`, a row for each prompt.
        end_ids: EOS ids. A completion ends with the first of them, which belongs to it.
        vocab_size: ids from here on are never sampled.

    Returns:
        Token ids of the completions, exactly as sampled, EOS included, padding not.
    """
    width = max(map(len, prompt_ids))
    pad_id = end_ids[0] if end_ids else 0  # Only a filler: the mask says what counts.
    device = model.device
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in prompt_ids], device=device)
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    numbers = None if uniforms is None else torch.from_numpy(uniforms).to(device)
    with evaluating(model):
        output = model.generate(
            input_ids,
            attention_mask=attention_mask,
            logits_processor=sampling.processors(vocab_size, numbers),
            # Greedy as far as `generate` knows: where there is chance, `InverseTransform` has had it.
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                min_new_tokens=sampling.min_new_tokens or None,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                use_cache=True,
                eos_token_id=list(end_ids) or None,
                pad_token_id=pad_id,
            ),
        )
    ends = set(end_ids)
    return [_until_end(row, ends) for row in output[:, width:].tolist()]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode and without its `generation_config`; each module is as it was afterwards.

    `generate` would take from a model's own config whatever ours leaves open, such as suppressed tokens.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = [(module, module.generation_config) for module in model.modules() if "generation_config" in vars(module)]
    model.eval()
    for module, _ in configs:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        for module, config in configs:
            module.generation_config = config


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
) -> list[list[int]]:
    """`sample` for any number of prompts: in batches of like length, given back in the order of the prompts.

    Args:
        seed: makes the result repeatable, whatever the batch size.
        batch_size: completions at a time.
        on_batch: called with the size of each batch that is done.
    """
    uniforms = sampling.uniforms(len(prompt_ids), *(() if seed is None else (seed,)))
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    completions: list[list[int]] = [[]] * len(prompt_ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        numbers = None if uniforms is None else uniforms[rows]
        batch = [prompt_ids[row] for row in rows]
        done = sample(model, batch, sampling, numbers, end_ids=end_ids, vocab_size=vocab_size)
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

    Example:
        >>> QuarkGenerator.from_pretrained("run/final").generate("You are", quantile="best")  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conditioning: Conditioning | None):
        self.model = model
        self.tokenizer = tokenizer
        self.conditioning = conditioning
        self.end_ids = eos_ids(model, tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        self.vocab_size = conditioning.vocab_size if conditioning else min(rows, len(tokenizer))

    @property
    def context_length(self) -> int:
        """The most tokens the model can read."""
        return context_length(self.model)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, *, device: str | torch.device | None = None, **model_kwargs: Any
    ) -> "QuarkGenerator":
        """Load a run's `final/`, a checkpoint, a hub name, or a plain model, which knows no quantiles.

        Args:
            path: where the model is.
            device: where it goes; a GPU if there is one.
            model_kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `dtype`.

        Raises:
            UserError: there is no model, or no tokenizer.
        """
        model = load_model(path, **model_kwargs)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device).eval(), load_tokenizer(path), Conditioning.load(path))

    def generate(
        self,
        prompts: str | Sequence[str | list[dict[str, str]]],
        quantile: str | int = "best",
        num_return_sequences: int = 1,
        seed: int | None = None,
        **generate_kwargs: Any,
    ) -> list[list[str]]:
        """Completions as text, without the prompt.

        Args:
            prompts: a text, or a list of texts or chat messages.
            quantile: "best", "worst", or 0 (worst) to K - 1 (best); a plain model has only "best", itself.
            num_return_sequences: completions for each prompt, S.
            seed: makes the result repeatable.
            generate_kwargs: the fields of `Sampling`: `max_new_tokens` (20), `min_new_tokens` (0),
                `temperature` (1.0), `top_p` (0.9), `do_sample` (True).

        Returns:
            A list for each prompt, of S texts.

        Raises:
            UserError: no such quantile, an unknown option, an empty prompt.
        """
        options = [field.name for field in fields(Sampling)]
        if unknown := [name for name in generate_kwargs if name not in options]:
            raise UserError(f"unknown option {unknown[0]!r}: want {', '.join(options)}")
        if num_return_sequences < 1:
            raise UserError(f"num_return_sequences {num_return_sequences}: want at least 1")
        sampling = Sampling(**generate_kwargs)
        texts = [prompts] if isinstance(prompts, str) else prompts
        ids = [row for row in self.encode(texts, quantile) for _ in range(num_return_sequences)]
        longest, room = max(map(len, ids), default=0), self.context_length - sampling.max_new_tokens
        if longest > room:
            raise UserError(f"a prompt has {longest} tokens, the model has room for {room} beside the completion")
        done = complete(self.model, ids, sampling, end_ids=self.end_ids, vocab_size=self.vocab_size, seed=seed)
        completions = self.decode(done)
        return [completions[i : i + num_return_sequences] for i in range(0, len(completions), num_return_sequences)]

    def encode(self, prompts: Sequence[str | list[dict[str, str]]], quantile: str | int = "best") -> list[list[int]]:
        """Token ids of the prompts, with the reward tokens of `quantile` in front."""
        encoded = []
        for prompt in prompts:
            if isinstance(prompt, str):
                # An EOS that the tokenizer puts behind a text is taken off, since a completion goes on from there.
                tokens = self.tokenizer(prompt, return_special_tokens_mask=True)
                ids, added = tokens["input_ids"], tokens["special_tokens_mask"]
                ids = ids[:-1] if ids and added[-1] and ids[-1] == self.tokenizer.eos_token_id else ids
            else:
                ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            plain = self.conditioning.strip(ids) if self.conditioning else list(ids)
            if not plain:
                raise UserError(f"prompt {prompt!r} has no tokens: want some text to continue")
            encoded.append(self.condition(plain, quantile))
        return encoded

    def condition(self, plain_ids: Sequence[int], quantile: str | int = "best") -> list[int]:
        """A prompt's plain token ids with the reward tokens of `quantile` in front."""
        if self.conditioning is not None:
            return self.conditioning.prefix(plain_ids, self.conditioning.quantiles_of(quantile))
        if quantile != "best":
            raise UserError(f"quantile {quantile!r}: this model was not trained by Quark and has no quantiles")
        return list(plain_ids)

    def decode(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Texts of completions, without special tokens."""
        return decode(self.tokenizer, completions)


def decode(tokenizer: PreTrainedTokenizerBase, completions: Sequence[Sequence[int]]) -> list[str]:
    """Texts for rewards and people: without special tokens, otherwise as the model wrote them."""
    return tokenizer.batch_decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False)
