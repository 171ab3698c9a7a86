"""A batch of texts that a model reads and goes on reading, token by token, with a cache of what it has read.

`generate` of transformers does this too, but for each of a prompt's samples anew, and for those that have ended until
the last one has. Here a prompt is read once for all its samples, and the ended can leave the batch.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

# A model, or a context that gives one while it lasts, such as a policy with its adapter switched off.
Reader: TypeAlias = PreTrainedModel | Callable[[], AbstractContextManager[PreTrainedModel]]


class Reading:
    """What a model has read of a batch of texts.

    Args:
        reader: the model; it is used as it is, in training mode or not.
        input_ids: `(beginnings, length)` how the texts begin, padded on the left.
        attention_mask: `(beginnings, length)`, 1 = counts.
        parts: `(batch,)`, which of the beginnings each text goes on from.
    """

    def __init__(self, reader: Reader, input_ids: Tensor, attention_mask: Tensor, parts: Tensor):
        self._reader = reader
        self._unread = input_ids
        self._mask = attention_mask
        self._parts = parts
        self._cache: Any = None

    @classmethod
    def of(cls, reader: Reader, texts: Sequence[Sequence[int]], device: torch.device) -> "Reading":
        """A reading of token ids; those that are the same are read once."""
        number: dict[tuple[int, ...], int] = {}
        parts = [number.setdefault(tuple(ids), len(number)) for ids in texts]
        return cls(reader, *left_padded(list(number), device), torch.tensor(parts, device=device))

    @property
    def batch_size(self) -> int:
        """The number of texts."""
        return len(self._mask)

    @torch.no_grad()
    def begin(self) -> Tensor:
        """Read the beginnings; the `(batch, vocab)` logits of each text's next token."""
        logits = self._read()
        self.keep(self._parts)
        return logits[self._parts]

    @torch.no_grad()
    def go_on(self, tokens: Tensor) -> Tensor:
        """Read a token of each text, `(batch,)`; the `(batch, vocab)` logits of the next."""
        self._unread = tokens[:, None]
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(tokens), 1)), dim=1)
        return self._read()

    def keep(self, rows: Tensor) -> None:
        """Go on with the given rows of the batch alone, `(n,)`."""
        self._mask = self._mask[rows]
        self._cache.reorder_cache(rows)

    def _read(self) -> Tensor:
        positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -self._unread.shape[1] :]
        with nullcontext(self._reader) if isinstance(self._reader, torch.nn.Module) else self._reader() as model:
            known = _parameters(model)
            cache = "past_key_values" if "past_key_values" in known else "cache_params"  # As models of states call it.
            optional = {"position_ids": positions, "logits_to_keep": 1}
            output = model(
                input_ids=self._unread,
                attention_mask=self._mask,
                use_cache=True,
                **{cache: self._cache},
                **{name: value for name, value in optional.items() if name in known},
            )
        self._cache = output[cache]
        return output.logits[:, -1]


@contextmanager
def made_once(*models: torch.nn.Module | None) -> Iterator[None]:
    """Nothing is learned meanwhile, and no weight is cast or put together twice.

    Autocast keeps what it has cast of a learned weight, of a frozen one it does not: a frozen GPT-2 small was cast anew
    for each token, which took 4.5 times as long to sample on a CPU. So all weights count as learned until the end. And
    `peft` makes the tables of an adapter that learns rows of tokens anew in each forward pass, which took seven times
    what the rest of a token does. So the rows stand in the tables until the end.
    """
    modules = [model for model in models if model is not None]
    weights = (weight for model in modules for weight in model.parameters())
    frozen = [weight for weight in weights if weight.is_floating_point() and not weight.requires_grad]
    tables = [table for model in modules for table in _tables_of_rows(model)]
    try:
        with torch.no_grad():
            for weight in frozen:
                weight.requires_grad_(True)
            for table in tables:
                table.merge()
            yield
    finally:
        for table in tables:
            if table.merged:  # peft takes the rows out by itself where the adapter is switched off
                table.unmerge()
        for weight in frozen:
            weight.requires_grad_(False)


def _tables_of_rows(model: torch.nn.Module) -> list[Any]:
    """The layers of `peft` that hold learned rows beside a table."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    tables = [layer for layer in model.modules() if isinstance(layer, TrainableTokensLayer)]
    # Of a sharded table (FSDP) a process has a part, and the whole only within the forward pass.
    return [table for table in tables if not hasattr(table.get_base_layer().weight, "device_mesh")]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`(batch, length)` ids and mask; padding has id 0, since the mask says what counts."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _parameters(model: PreTrainedModel) -> Sequence[str]:
    """The names that the model's forward pass knows; one without positions (ALiBi) takes none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tuple(inspect.signature(base.forward).parameters)
