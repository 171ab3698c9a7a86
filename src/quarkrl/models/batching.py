"""Batches to learn from: samples as padded tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
