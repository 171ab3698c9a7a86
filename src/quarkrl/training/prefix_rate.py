"""A learning rate of their own for the embedding rows of new tokens.

The rows are a part of the embedding, whose other rows they share an optimizer state and a parameter group with. So the
optimizer makes its step, and then the change of the rows is scaled. For Adam, whose step does not depend on the size of
the gradient, this is the same as another learning rate.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quarkrl.models.token_rows import TokenRows


def scale_rate_of_rows(optimizer: torch.optim.Optimizer, model: Any, token_ids: Sequence[int], scale: float) -> None:
    """Let every step of an optimizer change the rows of some tokens `scale` times as much.

    Args:
        optimizer: of torch.
        model: the policy, with an adapter or not.
        token_ids: the tokens.
        scale: 1 changes nothing.
    """
    tables = trained_tables(model, token_ids)
    before: list[Tensor] = []

    def remember(*_: Any) -> None:
        before[:] = [weight.detach()[rows] for weight, rows in tables]

    @torch.no_grad()
    def rescale(*_: Any) -> None:
        for (weight, rows), old in zip(tables, before, strict=True):
            weight[rows] = old + scale * (weight[rows] - old)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(rescale)


def trained_tables(model: Any, token_ids: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return each trained weight of the input embedding that has rows of the tokens, with the numbers of these rows."""
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "token_adapter", embedding)
    tables = []
    if isinstance(embedding, TokenRows):
        for name in embedding.active_adapters:
            ids = embedding.token_indices[name]
            tables.append((embedding.trainable_tokens_delta[name], [ids.index(i) for i in token_ids if i in ids]))
    else:
        weights = [weight for weight in embedding.parameters() if weight.requires_grad and len(weight) > max(token_ids)]
        tables += [(weight, list(token_ids)) for weight in weights]
    return [(weight, torch.tensor(rows, device=weight.device)) for weight, rows in tables if rows]
