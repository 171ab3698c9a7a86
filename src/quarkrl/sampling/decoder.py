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
from transformers.modeling_outputs import BaseModelOutput
from typing_extensions import Self

from quarkrl.models.batching import left_pad
from quarkrl.models.encoder_decoder import decoder_start_ids, is_encoder_decoder

# A model, or a function whose context provides one, such as a policy with its adapter disabled.
ModelSource: TypeAlias = PreTrainedModel | Callable[[], AbstractContextManager[PreTrainedModel]]


class CachedDecoder:
    """A batch of token sequences, and the model's cache of keys and values for them.

    Call `prefill` once, then `step` for each new token. In an encoder–decoder model the encoder reads the prompts, and
    the new tokens follow the decoder's start ids.

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
        self._encoded: Tensor | None = None  # (batch, prompt length, width) what an encoder has made of the prompts

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
        self._encoded = None if self._encoded is None else self._encoded[rows]
        self._cache.reorder_cache(rows)

    def _forward(self, input_ids: Tensor) -> Tensor:
        with nullcontext(self._model) if isinstance(self._model, torch.nn.Module) else self._model() as model:
            if is_encoder_decoder(model):
                return self._forward_encoder_decoder(model, input_ids)
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
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

    def _forward_encoder_decoder(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        if self._encoded is None:
            order = self._mask.argsort(
                dim=1, descending=True, stable=True
            )  # Positions in an encoder count from the left.
            self._mask = self._mask.gather(1, order)
            starts = torch.tensor(decoder_start_ids(model), device=input_ids.device).expand(len(input_ids), -1)
            inputs: dict[str, Any] = {"input_ids": input_ids.gather(1, order), "decoder_input_ids": starts}
        else:
            inputs = {"encoder_outputs": BaseModelOutput(self._encoded), "decoder_input_ids": input_ids}
        length = self._mask.shape[1] if self._encoded is None else self._encoded.shape[1]
        output = model(**inputs, attention_mask=self._mask[:, :length], past_key_values=self._cache, use_cache=True)
        self._encoded, self._cache = output.encoder_last_hidden_state, output.past_key_values
        return output.logits[:, -1]


def forward_parameters(model: PreTrainedModel) -> Sequence[str]:
    """Return the parameter names of the model's forward pass; a model without positions (ALiBi) takes none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tuple(inspect.signature(base.forward).parameters)
