"""Batches to learn from: which samples stand together, and what tensors they become."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def bucketed(drawn: np.ndarray, lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
    """The draws with those of like length side by side: within stretches of 50 batches, whose order stays random."""
    order = []
    for stretch in np.split(np.arange(len(drawn)), range(50 * batch_size, len(drawn), 50 * batch_size)):
        by_length = stretch[np.argsort(lengths[stretch], kind="stable")]
        batches = by_length.reshape(-1, batch_size)
        order.append(rng.permutation(batches).reshape(-1))
    return drawn[np.concatenate(order)]


def padded(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Prompts and completions as right-padded tensors; padding is told by the mask, never by the id.

    Returns:
        `input_ids`, `attention_mask` (1 = counts) and `labels` (-100 outside the completion), each `(batch, length)`.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    shape = (len(rows), max(map(len, rows)))
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        labels[i, len(prompt) : len(row)] = input_ids[i, len(prompt) : len(row)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
