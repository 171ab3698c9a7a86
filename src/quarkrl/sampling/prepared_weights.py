"""Prepare weights once for many forward passes without gradients: dtype casts, and token rows of adapters.

Both costs recur in each forward pass, so that sampling pays them for each token:

- Autocast caches the cast of a weight only if the weight requires a gradient. A frozen GPT-2 small was cast again for
  each token, which made sampling 4.5 times as slow on a CPU.
- An adapter's matrices are two more products for each of the model's. Together with its trained token rows they took
  two thirds of the products of SmolLM2, and half of the time.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from quarkrl.models.sharding import is_sharded


@contextmanager
def prepare_weights_once(*models: torch.nn.Module | None, merge_adapters: bool = False) -> Iterator[None]:
    """Cast each weight and merge each adapter's token rows once within the block; gradients are disabled.

    Within the block, every weight requires a gradient, which lets autocast cache its cast, and peft's token rows are
    merged into the embedding tables. Both are undone at the end.

    Args:
        models: the models that run within the block; None is ignored.
        merge_adapters: also merge adapters into copies of the weights they change. The weights themselves are kept, so
            that the end of the block restores them exactly. No adapter may be switched off within the block.

    Raises:
        RuntimeError: the block ended normally, but a weight or a token table is not as it was before.
    """
    present = [model for model in models if model is not None]
    layers = [layer for model in present for layer in _mergeable_layers(model)] if merge_adapters else []
    state = _WeightState(present)
    try:
        with torch.no_grad(), _merged_into_copies(layers):
            state.prepare()
            yield
    finally:
        state.restore()
    state.verify()  # Not after an exception, which it would hide.


class _WeightState:
    """Which weights require a gradient and which token tables are merged, as found before the block."""

    def __init__(self, models: list[torch.nn.Module]):
        self._requires_grad = {
            weight: (name, weight.requires_grad) for model in models for name, weight in model.named_parameters()
        }
        self._frozen = [
            weight
            for weight, (_, requires_grad) in self._requires_grad.items()
            if weight.is_floating_point() and not requires_grad
        ]
        tables = [(name, table) for model in models for name, table in _token_tables(model)]
        self._tables = [(name, table, list(table.merged_adapters), _table_rows(table)) for name, table in tables]

    def prepare(self) -> None:
        for weight in self._frozen:
            weight.requires_grad_(True)
        for _, table, merged_adapters, _ in self._tables:
            if not merged_adapters:
                table.merge()

    def restore(self) -> None:
        for _, table, merged_adapters, _ in self._tables:
            # peft itself unmerges a table when the adapter is disabled within the block.
            if table.merged and not merged_adapters:
                table.unmerge()
        for weight in self._frozen:
            weight.requires_grad_(False)

    def verify(self) -> None:
        changed = [
            f"requires_grad of {name}"
            for weight, (name, requires_grad) in self._requires_grad.items()
            if weight.requires_grad != requires_grad
        ]
        for name, table, merged_adapters, rows in self._tables:
            if list(table.merged_adapters) != merged_adapters:
                changed.append(f"merged adapters of {name}")
            elif not torch.allclose(_table_rows(table), rows, rtol=0, atol=0, equal_nan=True):
                changed.append(f"token rows of {name}")
        if changed:
            raise RuntimeError(f"weights changed while they were prepared for sampling: {', '.join(changed[:3])}")


@contextmanager
def _merged_into_copies(layers: list[Any]) -> Iterator[None]:
    """Merge adapters into copies of their base weights. Unmerging would round; the kept weights are exact."""
    kept: list[tuple[Any, list[tuple[torch.nn.Parameter, Tensor]]]] = []
    try:
        for layer in layers:
            parameters = list(layer.get_base_layer().parameters())
            kept.append((layer, [(parameter, parameter.data) for parameter in parameters]))
            for parameter in parameters:
                parameter.data = parameter.data.clone()
            layer.merge()
        yield
    finally:
        for layer, parameters in kept:
            for parameter, data in parameters:
                parameter.data = data
            layer.merged_adapters.clear()


def _mergeable_layers(model: torch.nn.Module) -> list[Any]:
    """The peft layers of a model that can be merged exactly: whole weights in floating point, not merged yet."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer) and not layer.merged
    ]
    weights = [list(layer.get_base_layer().parameters()) for layer in layers]
    shared = Counter(id(weight) for several in weights for weight in several)
    return [
        layer
        for layer, several in zip(layers, weights, strict=True)
        if all(weight.is_floating_point() and shared[id(weight)] == 1 for weight in several) and not is_sharded(layer)
    ]


def _token_tables(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The peft layers of a model that hold trained rows beside an embedding table, by name."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    tables = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, TrainableTokensLayer)]
    # Under FSDP a process holds a shard of the table, and the whole table only within the forward pass.
    return [(name, table) for name, table in tables if not hasattr(table.get_base_layer().weight, "device_mesh")]


def _table_rows(table: Any) -> Tensor:
    """A copy of the base table's rows that merging replaces."""
    weight = table.get_base_layer().weight.detach()
    indices = [index for rows in table.token_indices.values() for index in rows]
    return weight[torch.tensor(indices, dtype=torch.long, device=weight.device)].clone()
