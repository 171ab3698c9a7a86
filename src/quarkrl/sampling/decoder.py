"""Incremental decoding with a KV cache: a batch of completions, one token at a time.

`generate` of transformers processes a prompt once for each of its samples, and keeps ended completions in the batch
until the last one ends. `CachedDecoder` processes each distinct prompt once, and can remove rows from the batch.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from quarkrl.models.batching import left_pad

# A model, or a function whose context provides one, such as a policy with its adapter disabled.
ModelSource: TypeAlias = PreTrainedModel | Callable[[], AbstractContextManager[PreTrainedModel]]


class CachedDecoder:
    """A batch of token sequences, and the model's cache of keys and values for them.

    Call `prefill` once, then `step` for each new token.

    Args:
        model: the model; its training mode is not changed.
        prompt_ids: `(prompts, length)` distinct prompts, padded on the left.
        prompt_mask: `(prompts, length)`, 1 = counts.
        prompt_of_row: `(batch,)`, the prompt of each row of the batch.
    """

    # Ended completions are removed when they are at least this share of the batch: removal copies the others' cache.
    min_share_to_remove = 1 / 16

    def __init__(self, model: ModelSource, prompt_ids: Tensor, prompt_mask: Tensor, prompt_of_row: Tensor):
        self._model = model
        self._prompt_ids = prompt_ids
        self._prompt_of_row = prompt_of_row
        self._mask = prompt_mask
        self._cache: Any = None

    @classmethod
    def for_prompts(cls, model: ModelSource, prompts: Sequence[Sequence[int]], device: torch.device) -> Self:
        """Create a decoder with one row for each prompt; equal prompts are processed once."""
        numbers: dict[tuple[int, ...], int] = {}
        prompt_of_row = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts]
        return cls(model, *left_pad(list(numbers), device), torch.tensor(prompt_of_row, device=device))

    @property
    def batch_size(self) -> int:
        """The number of rows in the batch."""
        return len(self._mask)

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Process the prompts; return the `(batch, vocab)` logits of each row's first new token."""
        logits = self._forward(self._prompt_ids)
        self.select(self._prompt_of_row)
        return logits[self._prompt_of_row]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, `(batch,)`; return the `(batch, vocab)` logits of the next token."""
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        return self._forward(tokens[:, None])

    def select(self, rows: Tensor) -> None:
        """Replace the batch by the rows with these indices, `(n,)`."""
        self._mask = self._mask[rows]
        self._cache.reorder_cache(rows)

    def _forward(self, input_ids: Tensor) -> Tensor:
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        with nullcontext(self._model) if isinstance(self._model, torch.nn.Module) else self._model() as model:
            parameters = forward_parameters(model)
            # State-space models have another name for the cache.
            cache = "past_key_values" if "past_key_values" in parameters else "cache_params"
            optional = {"position_ids": positions, "logits_to_keep": 1}
            output = model(
                input_ids=input_ids,
                attention_mask=self._mask,
                use_cache=True,
                **{cache: self._cache},
                **{name: value for name, value in optional.items() if name in parameters},
            )
        self._cache = output[cache]
        return output.logits[:, -1]


def forward_parameters(model: PreTrainedModel) -> Sequence[str]:
    """Return the parameter names of the model's forward pass; a model without positions (ALiBi) takes none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tuple(inspect.signature(base.forward).parameters)
