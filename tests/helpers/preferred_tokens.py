"""Models whose next token is known."""

from __future__ import annotations


def prefer(model, *ids: int) -> None:
    """Make these tokens the most likely ones of a model, in this order, after any prompt."""

    def raise_logits(_module, _inputs, logits):
        for rank, token in enumerate(ids):
            logits[..., token] = 1000.0 - 10 * rank
        return logits

    model.get_output_embeddings().register_forward_hook(raise_logits)
