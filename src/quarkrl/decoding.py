"""How a completion's next token is chosen: the options (`Sampling`), and the logits processors that carry them out."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from quarkrl.errors import UserError

if TYPE_CHECKING:
    from quarkrl.config import QuarkConfig


# Sampling goes on in float32, whose range logits of some hundreds would leave if divided by next to nothing.
LEAST_TEMPERATURE = 1e-6


class OriginalVocabulary(LogitsProcessor):
    """Leaves only the first `vocab_size` token ids possible: no reward token, no row that merely pads the embedding.

    Raises:
        UserError: a model's logits are not finite, from which anything at all would be sampled.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.vocab_size :] = -torch.inf
        if not scores.amax(-1).isfinite().all():
            raise UserError(
                "the model's logits are not finite: its weights are damaged, or float16 is too narrow for them; "
                "want a sound model, in bfloat16 or float32"
            )
        return scores


class Nucleus(LogitsProcessor):
    """Leaves the most likely tokens possible that together have a probability of at least `top_p`.

    As transformers' `TopPLogitsWarper`, but that equally likely tokens stay or go together. That one sorts logits and
    their places, by torch, which took 40 % of the time of evaluating a 6M-parameter model on a CPU; this sorts
    probabilities alone, by NumPy where it can, in a quarter of the time.

    Args:
        top_p: below 1.
    """

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(-1, dtype=torch.float32)  # (batch, vocab)
        if probabilities.device.type == "cpu":
            ascending = torch.from_numpy(np.sort(probabilities.numpy(), axis=-1))
        else:
            ascending = probabilities.sort(-1).values
        dropped = (ascending.cumsum(-1) <= 1 - self.top_p).sum(-1, keepdim=True)
        # The most likely token always stays, even where its probability rounds to no more than 1 - top_p.
        least = ascending.gather(-1, dropped.clamp(max=ascending.shape[-1] - 1))
        return scores.masked_fill(probabilities < least, -torch.inf)


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
        min_new_tokens: EOS is not among the first so many; where it equals `max_new_tokens`, EOS never comes.
        temperature: divides the logits; above 0, and not so small that they overflow.
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
        if not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature {self.temperature}: want more than 0, at least {LEAST_TEMPERATURE}, and finite; "
                "do_sample=False (--greedy) takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: want more than 0 and at most 1")

    @classmethod
    def exploring(cls, args: "QuarkConfig") -> "Sampling":
        """As a run explores."""
        lengths = (args.max_completion_length, args.min_completion_length)
        return cls(*lengths, args.temperature, args.top_p, args.do_sample)

    @classmethod
    def evaluating(cls, args: "QuarkConfig") -> "Sampling":
        """As a run evaluates held-out prompts: completions of the same lengths."""
        lengths = (args.max_completion_length, args.min_completion_length)
        return cls(*lengths, args.eval_temperature, args.eval_top_p, args.eval_do_sample)

    def uniforms(self, count: int, *seed: int) -> np.ndarray | None:
        """`(count, max_new_tokens)` random numbers for so many completions; a completion is settled by its row."""
        if not self.do_sample:
            return None
        return np.random.default_rng(seed or None).random((count, self.max_new_tokens), dtype=np.float32)

    def processors(self, uniforms: Tensor | None) -> LogitsProcessorList:
        """What turns a step's logits over the original vocabulary into its choice; empty for greedy decoding."""
        processors = LogitsProcessorList()
        if uniforms is not None:
            if self.temperature != 1:
                processors.append(TemperatureLogitsWarper(self.temperature))
            if self.top_p < 1:
                processors.append(Nucleus(self.top_p))
            processors.append(InverseTransform(uniforms))
        return processors
