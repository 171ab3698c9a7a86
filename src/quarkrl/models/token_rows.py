"""Embedding rows of single tokens that a peft adapter trains, without a copy of the whole table.

peft replaces the rows in a copy of the table in each forward pass, and the gradient is a table of the same size. With
49,152 rows of width 576 these are 113 MB each, for the embedding and again for a tied output layer. `TokenRows` looks
up and multiplies the few rows beside the frozen table; values and gradients are the same.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn


class Rows(NamedTuple):
    """An output layer that trains the rows of some tokens: the frozen layer, ids `(R,)` and rows `(R, width)`."""

    layer: nn.Linear
    ids: Tensor
    values: Tensor


class TokenRows(TrainableTokensLayer):
    """peft's layer with another forward pass; everything else, saving and merging included, is peft's."""

    def forward_adapters(self, x: Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the frozen layer, and put the trained rows in place of its own."""
        base = self.base_layer
        if self.disable_adapters or self.merged or not active_adapters or not isinstance(base, _KNOWN_LAYERS):
            return super().forward_adapters(x, active_adapters, *args, **kwargs)
        self._check_overlapping_tokens(active_adapters)
        result = base(x, *args, **kwargs)
        for name in active_adapters:
            ids, values = self.rows_of(name)
            if isinstance(base, nn.Linear):
                result = result.index_copy(-1, ids, F.linear(x, values).to(result.dtype))
            else:
                scale = self._get_embed_scale()
                rows = values if scale is None else values * scale.to(values.dtype)
                matches = x[..., None] == ids  # (batch, length, R)
                result = torch.where(matches.any(-1, keepdim=True), rows[matches.int().argmax(-1)], result)
        return result

    def rows_of(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return the ids, `(R,)`, and the rows, `(R, width)`, that an adapter trains."""
        weight = cast(Tensor, self.base_layer.weight)
        # Kept, since a copy to a GPU waits for it, and cannot be recorded (sampling/recorded_steps.py).
        kept: dict[tuple[str, torch.device], Tensor] = self.__dict__.setdefault("_ids", {})
        if (adapter, weight.device) not in kept:
            kept[adapter, weight.device] = torch.tensor(self.token_indices[adapter], device=weight.device)
        return kept[adapter, weight.device], self.trainable_tokens_delta[adapter].to(weight)


_KNOWN_LAYERS = nn.Linear, nn.Embedding


def use_token_rows(adapted: nn.Module) -> None:
    """Replace the forward pass of peft's layers in a model, in place."""
    for module in adapted.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = TokenRows


def trained_rows(layer: nn.Module) -> Rows | None:
    """Return the trained rows of an output layer; None if it trains none, or if its adapter is switched off."""
    rows = getattr(layer, "token_adapter", layer)
    if not isinstance(rows, TokenRows) or not isinstance(rows.base_layer, nn.Linear):
        return None
    if getattr(layer, "disable_adapters", False) or rows.disable_adapters or rows.merged:
        return None
    if len(rows.active_adapters) != 1:
        return None
    return Rows(rows.base_layer, *rows.rows_of(rows.active_adapters[0]))
